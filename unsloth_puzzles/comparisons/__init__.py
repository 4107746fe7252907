"""Measurements too long for a notebook cell. They stand on `bench` and on the solutions, which import none of them."""
