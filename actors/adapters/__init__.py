"""Tasks that other packages bring, as tasks of ours."""
