"""The model: packed attention, encoders, connectors, and the transformers model class.

transformers comes first, so that avlm's classes are registered with it before any module here is half imported.
"""

import transformers as transformers
