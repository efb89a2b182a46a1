"""Measure real training steps on the GPU at hand, and hold memplan's figures against them.

Without torch: `record` (what a measurement file holds), `compare` (predicted against measured), `design` (which
runs to measure). With torch, transformers, PEFT and bitsandbytes: everything else; nothing here imports it by itself.

    design -> cases -> measure (server: one forked process a case -> run -> loop) -> records -> compare
"""
