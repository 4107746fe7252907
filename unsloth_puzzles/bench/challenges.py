"""The five challenges: their titles, and the files of their measurements."""

TITLES = {
    "A": "NF4 to Triton",
    "B": "QLoRA with FSDP2",
    "C": "torch.compile without graph breaks",
    "D": "Unsloth's open issues",
    "E": "Memory-efficient backprop",
}
FILES = {  # in resources/measurements/
    "A": "a_nf4.json",
    "B": "b_fsdp2.json",
    "C": "c_compile.json",
    "D": "d_issues.json",
    "E": "e_backprop.json",
}
