"""Stand-ins for pre-trained parts: a small CLIP, T5, ConvNeXt and Llama that only know the rendered world.

No checkpoint can be assumed on a fresh machine. These are real `transformers` models, trained by recipes of this
repository, and loaded through the same code as `openai/clip-vit-large-patch14`, `google/flan-t5-xl` or
`lmsys/vicuna-7b-v1.5`. The region proposer is a model of this package's own.
"""
