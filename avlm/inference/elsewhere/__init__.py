"""Doors of other projects: their names and forms outside, our model inside.

lmms.py         the entry point by which lmms-eval finds the model
lmms_models.py  its two classes; imports lmms-eval
asking.py       what they do, without lmms-eval
vllm.py         the entry point by which vLLM finds the model
vllm_model.py   its class; imports vLLM
counts.py       what vLLM has to know of media, from the layout
"""
