"""`foveate convert METHOD FILE`: a method's official weights as a folder that foveate and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.options import Debug, progress_bar
from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.methods.dynrefer.conversion import Conversion

# A verb for each method: they are made from different files.
app = typer.Typer(
    help="Convert official weights into a folder that foveate and transformers load.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SHOWN_KEYS = 8


@app.command()
def dynrefer(
    official: Annotated[Path, typer.Argument(help="The released file, such as vg1.2_5e.pth.")],
    base: Annotated[
        str, typer.Option("--base", help="BLIP-2: Salesforce/blip2-flan-t5-xl, or a folder of one with T5 or Vicuna.")
    ],
    text: Annotated[str, typer.Option("--text", help="eva_clip_psz14.pt, or a CLIP folder or hub name.")],
    language: Annotated[
        str | None, typer.Option("--language", help="Language model in place of the base's: folder or hub name.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; it must be new or empty.")] = None,
    tags: Annotated[Path | None, typer.Option("--tags", help="Tag list, one a line: ram_tag_list.txt.")] = None,
    attributes: Annotated[
        Path | None, typer.Option("--attributes", help="ovad2000.json; without it the model names no attributes.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option("--classes", help="Class names, one a line; COCO's 80 by default.")
    ] = None,
    text_tokenizer: Annotated[
        str | None, typer.Option("--text-tokenizer", help="Folder or hub name; by default that of CLIP.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as in the files.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare the files; write nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Convert the released DynRefer weights.

    Every key is used or named; missing, unknown and misshapen ones are one error. docs/convert.md says which files
    are needed and where they come from.
    """
    from foveate.methods.dynrefer.conversion import check_checkpoint, convert_checkpoint

    if check:
        _print(check_checkpoint(official, base=base, language=language, text=text))
        return
    for name, value, what in (("--out", out, "the folder to write"), ("--tags", tags, "the tag list")):
        if value is None:
            raise InputError(f"{name} is missing; give {what}, or --check to compare the files only.")
    assert out is not None
    assert tags is not None
    with progress_bar("tensors") as progress:
        result = convert_checkpoint(
            official,
            base=base,
            language=language,
            text=text,
            tags=tags,
            out=out,
            attributes=attributes,
            classes=classes,
            text_tokenizer=text_tokenizer,
            dtype=dtype,
            progress=progress,
        )
    _print(result)
    if attributes is None:
        print("no --attributes: leave them out of --tasks, or convert with ovad2000.json")
    print(f"model: {result.folder}")


@app.command("mg_llava")
def mg_llava(
    official: Annotated[Path, typer.Argument(help="The released folder, such as Vicuna-7B, or its iter_*.pth.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; it must be new or empty.")] = None,
    llm: Annotated[
        str | None, typer.Option("--llm", help="Folder or hub name of the base language model; known by the folder.")
    ] = None,
    clip: Annotated[str | None, typer.Option("--clip", help="CLIP of the low resolution; ViT-L/14-336.")] = None,
    convnext: Annotated[
        str | None, typer.Option("--convnext", help="ConvNeXt: file, folder or hub name, open_clip or timm layout.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="vicuna, phi3_chat, llama3_chat or qwen_chat; known by the model.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as in the files.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare the files; write nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Convert the released MG-LLaVA weights.

    Every key is used or named; missing, unknown and misshapen ones are one error. docs/convert.md says which files
    are needed and where they come from.
    """
    from foveate.methods.mg_llava.conversion import CLIP, CONVNEXT, convert_checkpoint

    if out is None and not check:
        raise InputError("--out is missing; give the folder to write, or --check to compare the files only.")
    with progress_bar("tensors") as progress:
        result = convert_checkpoint(
            official,
            out=None if check else out,
            llm=llm,
            clip=clip or CLIP,
            convnext=convnext or CONVNEXT,
            template=template,
            dtype=dtype,
            progress=progress,
        )
    _print_parts(result)
    config = result.config
    print(
        f"{config.fusion}, objects {config.objects}, {config.num_image_tokens} tokens an image, "
        f"{config.low_res_size} and {config.high_res_size} px, template {config.template}"
    )
    _print_unused(result)
    if result.folder is not None:
        print(f"model: {result.folder}")


@app.command("ram_plus")
def ram_plus(
    official: Annotated[Path, typer.Argument(help="The released file: ram_plus_swin_large_14m.pth.")],
    tags: Annotated[Path, typer.Option("--tags", help="Tag list, one a line: ram_tag_list.txt.")],
    thresholds: Annotated[
        Path, typer.Option("--thresholds", help="A threshold for each tag, one a line: ram_tag_list_threshold.txt.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; it must be new or empty.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare the files; write nothing.")] = False,
    debug: Debug = False,
) -> None:
    """RAM++'s released weights, tags and thresholds, as a tagger for `foveate boxes`."""
    from foveate.vision.ram_plus import convert_ram_plus

    if out is None and not check:
        raise InputError("--out is missing; give the folder to write, or --check to compare the files only.")
    unused = convert_ram_plus(official, tags=tags, thresholds=thresholds, out=None if check else out)
    if unused:
        more = ", ..." if len(unused) > SHOWN_KEYS else ""
        print(f"not used: {len(unused)} tensors: {', '.join(unused[:SHOWN_KEYS])}{more}")
    if not check:
        print(f"tagger: {out}")


@app.command("vision_gru")
def vision_gru(
    official: Annotated[Path, typer.Argument(help="The released file: vig_*_model_path.pth, or its averages.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; it must be new or empty.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare the file; write nothing.")] = False,
    debug: Debug = False,
) -> None:
    """VisionGRU's released weights, or their moving average, as a folder that loads here."""
    from foveate.methods.vision_gru.conversion import convert_checkpoint

    if out is None and not check:
        raise InputError("--out is missing; give the folder to write, or --check to compare the file only.")
    result = convert_checkpoint(official, None if check else out)
    config = result.config
    print(f"dim {config.dim}, depths {', '.join(map(str, config.depths))}, {result.parameters:,} parameters")
    if result.averaged:
        print("the moving average of the weights")
    if result.folder is not None:
        print(f"model: {result.folder}")


def _print(result: Conversion) -> None:
    """A row per part, and what was not used of each source."""
    _print_parts(result)
    config = result.config
    print(f"{config.num_views} views of {config.image_size} px, {config.num_query_tokens} queries")
    _print_unused(result)


def _print_parts(result: Any) -> None:
    rows = [("part", "from", "tensors", "parameters", "dtype")]
    rows += [(part.name, part.source, f"{part.tensors:,}", f"{part.parameters:,}", part.dtype) for part in result.parts]
    total = sum(part.tensors for part in result.parts), sum(part.parameters for part in result.parts)
    rows.append(("all", "", f"{total[0]:,}", f"{total[1]:,}", ""))
    wide = [max(len(row[column]) for row in rows) for column in range(5)]
    for name, source, tensors, parameters, dtype in rows:
        line = f"{name:<{wide[0]}}  {source:<{wide[1]}}  {tensors:>{wide[2]}}  {parameters:>{wide[3]}}  {dtype}"
        print(line.rstrip())


def _print_unused(result: Any) -> None:
    for source, keys in result.unused.items():
        if keys:
            more = ", ... (manifest.json has all)" if len(keys) > SHOWN_KEYS else ""
            print(f"not used of {source}: {len(keys)} tensors: {', '.join(keys[:SHOWN_KEYS])}{more}")
