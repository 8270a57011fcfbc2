"""The data side: formats in, media decoded, templates, tokens and places, the order, the loader.

transformers comes first, so that avlm's classes are registered with it before any module here is half imported.
"""

import transformers as transformers
