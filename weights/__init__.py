"""Teachers: converters of public checkpoints, their download, and the demo's teacher."""
