"""What transformers has renamed within its version 5, by the name that the installed release knows it by."""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

# The key/value cache, as an argument of a model and of an attention, and in a model's output: `past_key_values` before 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
