"""Beside transformers and PEFT: what both compute, layer by layer, and defects that such a comparison must find."""
