"""How good sparse autoencoders are on images that they were not trained on: `run.compare` measures, `report.write`
writes it down."""
