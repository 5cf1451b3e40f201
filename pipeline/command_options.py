"""Options that several commands have, said once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature


def with_options(
    made: Callable[..., object], name: str = "wanted"
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with a parameter `name`: the options of `made` take its place, and it is what `made` makes of them. Both
    functions are of one module, whose names their annotations use."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = signature(made, eval_str=True).parameters

        @wraps(command)
        def run(**given: object) -> None:
            own = {option: value for option, value in given.items() if option not in options}
            command(**own, **{name: made(**{option: given[option] for option in options})})

        described = signature(command, eval_str=True)
        parameters = [each for each in described.parameters.values() if each.name != name]
        merged = [*parameters, *options.values()]
        run.__signature__ = described.replace(  # type: ignore[attr-defined]
            parameters=sorted(merged, key=lambda each: each.default is not Parameter.empty)
        )
        run.__annotations__ = {each.name: each.annotation for each in merged}
        return run

    return decorate
