"""Names of the samplers that a job may ask for, as A1111 spells them. The engine maps each to its algorithm."""

SAMPLERS = ("DDIM", "DPM++ 2M", "DPM++ 2M Karras", "Euler", "Euler a", "Heun", "UniPC")
