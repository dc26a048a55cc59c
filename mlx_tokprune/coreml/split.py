"""The functions of a package, cut from one converted program: `split`.

A converted program computes the outputs of all functions, named FUNCTION_OUTPUT, with
one vision tower. Core ML runs each function apart, so each gets the operations that its
outputs need. The weights stay in one file, to which all functions point.
"""

from collections.abc import Sequence

from .describe import OUTPUTS, Function


def output_name(function: str, output: str) -> str:
    """The name in the whole program of one function's output."""
    return f"{function}_{output}"


def split(spec, functions: Sequence[Function]) -> None:
    """Replace the program in `spec` by `functions`; a single one is named `main`."""
    from coremltools.proto.Model_pb2 import FunctionDescription, ModelDescription

    described, programs = spec.description, spec.mlProgram.functions
    whole, several = programs["main"], len(functions) > 1
    made, interfaces = {}, []
    for function in functions:
        names = {output_name(function.name, output): output for output in OUTPUTS}
        made[function.name if several else "main"] = _cut(whole, names)
        interface = FunctionDescription(name=function.name, input=described.input)
        for feature in described.output:
            if feature.name in names:
                interface.output.add().CopyFrom(feature)
                interface.output[-1].name = names[feature.name]
        interfaces.append(interface)
    programs.clear()
    for name, program in made.items():
        programs[name].CopyFrom(program)
    if several:
        first = functions[0].name
        table = ModelDescription(functions=interfaces, defaultFunctionName=first)
        described.CopyFrom(table)
    else:
        del described.output[:]
        described.output.extend(interfaces[0].output)


def _cut(whole, names: dict[str, str]):
    """The part of a MIL function that computes the outputs in `names`, renamed."""
    from coremltools.proto.MIL_pb2 import Function as Program

    program = Program(opset=whole.opset, inputs=whole.inputs)
    source = whole.block_specializations[whole.opset]
    block = program.block_specializations[whole.opset]
    outputs = [name for name in source.outputs if name in names]
    block.outputs.extend(names[name] for name in outputs)
    block.operations.extend(_needed(source.operations, set(outputs)))
    for operation in block.operations:
        for variable in (*operation.outputs, *_arguments(operation)):
            variable.name = names.get(variable.name, variable.name)
    return program


def _needed(operations, wanted: set[str]) -> list:
    """The operations that compute the variables in `wanted`, in order."""
    kept, wanted = [], set(wanted)
    for operation in reversed(operations):
        if not wanted.isdisjoint(output.name for output in operation.outputs):
            wanted.update(argument.name for argument in _arguments(operation))
            kept.append(operation)
    return kept[::-1]


def _arguments(operation) -> list:
    """The inputs of an operation that are variables."""
    inputs = operation.inputs.values()
    return [a for value in inputs for a in value.arguments if a.name]
