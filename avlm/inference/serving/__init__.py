"""A model behind OpenAI's HTTP interface.

    app          all of it put together            listening     the process: address, signals, the end
    gate         who may ask, and from where       bodies        what comes in, by size and time
    places       how many may ask at once          reading       processes that read what strangers wrote
    fields       one request's fields              asking        conversations and their wishes
    forms        multipart bodies                  running       the thread in which the model answers
    completions  /v1/chat/completions              transcribing  /v1/audio/transcriptions
    answering    answers as OpenAI writes them     about         /v1/models, /health, /metrics
    refusing     errors as OpenAI writes them      counting      what is counted

A request takes a place, its body is received against a clock, and a worker process reads it: JSON, media, tokens.
Nothing that a stranger wrote is parsed in the process that holds the model. What comes out joins the running batch.
"""
