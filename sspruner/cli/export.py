"""`sspruner export`: write a model for other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from sspruner.cli.console import prepare, reports_errors, say
from sspruner.cli.help import command_app
from sspruner.cli.machine import Folder, Model, ReadingText
from sspruner.formats.gguf_options import GGUF
from sspruner.recipes.flags import TARGET, text
from sspruner.recipes.parts import Target

NAME = "export"


@Parameter(name="*", group=TARGET)
@dataclass(frozen=True)
class Reader(Target):
    """The library that will load the model."""

    to: Annotated[str | None, text("NAME", default="hf, or what --target reads")] = None
    """hf: stock transformers. hf-padded: stock, different sizes padded with zeros. hf-remote: transformers with
    trust_remote_code. mamba-ssm: its own loader. gguf, gguf-padded: llama.cpp. sspruner: sspruner.load."""


@reports_errors
def command(
    model: Model = None,
    /,
    *,
    folder: Folder,
    reader: Reader = Reader(),
    gguf: GGUF = GGUF(),
    reading: ReadingText = ReadingText(),
) -> None:
    """Run `sspruner export`.

    Examples:
        sspruner export smaller --out for-transformers
        sspruner export smaller --to gguf --gguf-type q8_0 --out for-llama
    """
    from sspruner.files.output import check_output
    from sspruner.formats.writers import gguf_options, reads, writer_of

    target: dict[str, Any] = {"target": reader.runtime, "tp": reader.tp}
    writer = writer_of(reader.to, reader.runtime, reader.tp)
    options = gguf_options(writer, gguf)
    check_output(folder.out, folder.overwrite)

    import sspruner
    from sspruner.formats.gguf import gguf_package
    from sspruner.formats.stock import padding
    from sspruner.io.skeleton import skeleton
    from sspruner.reporting.card import report_beside

    prepare(reading.plugin, model)
    if writer == options.format:
        gguf_package()
    loaded, tokenizer = sspruner.load(model, **reading.arguments)
    report = report_beside(loaded, model) if model else None
    to = options if writer == options.format else writer
    sspruner.export(loaded, folder.out, tokenizer, to=to, **target, report=report, overwrite=folder.overwrite)
    say(f"exported to {folder.out}: {reads(writer, folder.out)}")
    if writer == "hf-padded":
        say(padding(loaded, skeleton(folder.out)))


app = command_app(NAME, command)
