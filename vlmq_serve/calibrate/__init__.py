"""Image-conditioned calibration of decoder layers; entry functions: `pipeline.calibrate`, `planning.make_plan`."""
