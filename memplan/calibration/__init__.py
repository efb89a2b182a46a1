"""Measure real training steps on the GPU at hand, and hold memplan's figures against them.

Without torch: `record` (what a measurement file holds), `compare` (predicted against measured), `design`
(which runs to measure), `trace` (the allocator's history). Everything else needs torch, transformers, PEFT
and bitsandbytes, and is imported by nothing outside this package.

    design -> cases -> measure (server: one forked process a case -> run -> loop) -> records -> compare
"""
