"""Files by URL, where the user allows it: one parser of addresses, checked hosts, limits of time and size, a cache."""
