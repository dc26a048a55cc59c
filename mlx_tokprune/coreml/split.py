"""Separation of one converted program into the functions of a package: `split`.

A converted program computes the outputs of all functions, named FUNCTION_OUTPUT, with
one vision tower. Core ML runs functions separately, so each gets the operations that
its outputs need. The weights stay in one file, to which all functions point.
"""

from collections.abc import Sequence
from typing import Any

from .describe import OUTPUTS, Function, Model

# Messages of coremltools.proto.MIL_pb2, whose classes have no types.
MILFunction = Any
Operation = Any
Binding = Any


def output_name(function: str, output: str) -> str:
    """Return the name of a function's output in the whole program."""
    return f"{function}_{output}"


def split(spec: Model, functions: Sequence[Function]) -> None:
    """Replace the program in `spec` by `functions`; name a single function `main`."""
    from coremltools.proto import Model_pb2

    messages: Any = Model_pb2
    description, programs = spec.description, spec.mlProgram.functions
    whole, several = programs["main"], len(functions) > 1
    separated, interfaces = {}, []
    for function in functions:
        names = {output_name(function.name, output): output for output in OUTPUTS}
        separated[function.name if several else "main"] = _cut(whole, names)
        interface = messages.FunctionDescription(
            name=function.name, input=description.input
        )
        for feature in description.output:
            if feature.name in names:
                interface.output.add().CopyFrom(feature)
                interface.output[-1].name = names[feature.name]
        interfaces.append(interface)
    programs.clear()
    for name, program in separated.items():
        programs[name].CopyFrom(program)
    if several:
        first = functions[0].name
        table = messages.ModelDescription(
            functions=interfaces, defaultFunctionName=first
        )
        # A package with several functions describes them in this table only.
        description.CopyFrom(table)
    else:
        del description.output[:]
        description.output.extend(interfaces[0].output)


def _cut(whole: MILFunction, names: dict[str, str]) -> MILFunction:
    """Return the part of a MIL function with the outputs in `names`, renamed."""
    from coremltools.proto import MIL_pb2

    messages: Any = MIL_pb2
    program = messages.Function(opset=whole.opset, inputs=whole.inputs)
    source = whole.block_specializations[whole.opset]
    block = program.block_specializations[whole.opset]
    outputs = [name for name in source.outputs if name in names]
    block.outputs.extend(names[name] for name in outputs)
    block.operations.extend(_needed(source.operations, set(outputs)))
    for operation in block.operations:
        for variable in (*operation.outputs, *_arguments(operation)):
            variable.name = names.get(variable.name, variable.name)
    return program


def _needed(operations: Sequence[Operation], variables: set[str]) -> list[Operation]:
    """Return the operations that compute `variables`, in order."""
    kept, variables = [], set(variables)
    for operation in reversed(operations):
        if not variables.isdisjoint(output.name for output in operation.outputs):
            variables.update(argument.name for argument in _arguments(operation))
            kept.append(operation)
    return kept[::-1]


def _arguments(operation: Operation) -> list[Binding]:
    """Return the inputs of an operation that are variables."""
    inputs = operation.inputs.values()
    return [a for value in inputs for a in value.arguments if a.name]
