"""Image-conditioned calibration of decoder layers; entry functions: `pipeline.calibrate`, `plan.make_plan`."""
