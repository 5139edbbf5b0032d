"""The contracts: one frozen dataclass per action, and nothing else.

A contract class is at once the wire format (its fields are the parameters), the static type, the access rule, the help
text (docstring and `Doc`) and the command of `circlectl`.
"""
