"""The artifact in other people's formats: each file has the names, the config and the refusal of one of them.

What a stock loader can represent is written so that it loads with the right logits; what it cannot is written so that it
*refuses*. transformers skips a quantization method that it does not know and then starts from random weights, so a refusal
needs an unknown `model_type` as well as our own `quant_method`; PEFT refuses an unknown `peft_type`.
"""
