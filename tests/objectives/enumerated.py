"""Every objective there is, by what it works on: the lists that all laws run over."""

from potstill.objectives.registry import OBJECTIVE_SPECS, find_spec, list_objective_names

METHODS = [name for name, spec in OBJECTIVE_SPECS.items() if spec.uses_teacher]  # those with a teacher
ALIKE_METHODS = [name for name in METHODS if OBJECTIVE_SPECS[name].supports_same_tokenizer]
ACROSS_METHODS = [name for name in METHODS if OBJECTIVE_SPECS[name].supports_cross_tokenizer]
ROUTED = ["balance", "load", "language_routing"]  # of students with experts or depth gates: of no model of these tests
ALIGNED = [name for name, spec in OBJECTIVE_SPECS.items() if spec.data != "text"]  # held to laws of their own
ALIKE = [
    name
    for name in list_objective_names()
    if name not in (*ROUTED, *ALIGNED) and find_spec(name).supports_same_tokenizer
]
