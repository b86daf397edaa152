"""Exports the SAEs of a sweep to folders named as Gemma Scope's are, with an index of them.

DIR/SITE/width_16k/average_l0_32/   an export each; -2, -3, ... where another has the same name
DIR/index.json, index.csv           path, run_id, architecture, site, width, L0, FVU, CE recovered,
                                    and the number of held-out rows that L0 and FVU are of
DIR/README.md                       the same table, and the hub's model card
"""

import csv
import dataclasses
import io
import pathlib
import re
import sys
from typing import Annotated

import msgspec
import tqdm
from absl import logging

from sae_jax import interop, paths
from sae_jax.errors import UserError
from sae_jax.interop.card import Hub, collection_card
from sae_jax.interop.provenance import read_provenance
from sae_jax.interop.select import select, still_done
from sae_jax.json_files import checked, read_json
from sae_jax.train.directory import read_config
from sae_jax.train.evaluated_rows import unlike_evaluations


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Describes an SAE in index.json; `path` is that of its folder in the index's."""

    path: str
    run_id: str
    architecture: str
    site: str
    width: Annotated[int, msgspec.Meta(ge=1)]
    l0: float | None
    fvu: float | None
    ce_recovered: float | None
    rows: int | None = None  # on which L0 and FVU were measured


@dataclasses.dataclass(frozen=True)
class _Index:
    """Describes index.json."""

    format: str
    saes: list[_Entry]


def export_many(
    sweep: paths.AnyPath,
    format: str,
    out: pathlib.Path,
    terms: str = "",
    hub: Hub | None = None,
    extra_provenance: dict | None = None,
    model=None,
) -> list[dict]:
    """Exports runs of a sweep to `out`, and returns the entries of the index there.

    Exports that are there already are kept: called again after it was stopped it writes those that
    are missing, and called with other terms it adds to them.

    Raises UserError, before anything is written, if the format cannot express one of the runs or if
    `out` holds something else.

    Args:
      sweep: the sweep's directory.
      format: a name of `FORMATS`.
      out: the directory of all exports.
      terms: the conditions of `select` on the runs; "" exports all that are done.
      hub: where on the hub the exports will be, and their license.
      extra_provenance: what `read_provenance` cannot know, such as the model's name on the hub.
      model: the language model, for `interop.export`.
    """
    hub = hub or Hub()
    names = [row["run_id"] for row in still_done(sweep, select(sweep, terms))]
    runs = {name: paths.inside(sweep / "runs", name) for name in names}
    for run in runs.values():
        interop.check_expressible(read_config(run).sae, format)
    index = _read_index(out, format)
    provenances = {}
    for run_id, run in runs.items():
        provenances[run_id] = provenance = read_provenance(run) | (extra_provenance or {})
        taken = [entry["path"] for name, entry in index.items() if name != run_id]
        entry = _entry(run_id, provenance)
        if run_id in index:
            path = index[run_id]["path"]
        else:
            path = _free_name(_folder_name(provenance), taken)
        index[run_id] = {"path": path} | entry
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}") from None
    # First, so that an export that was stopped finds its folders again.
    paths.save_json({"format": format, "saes": list(index.values())}, out / "index.json")
    missing = [run_id for run_id in runs if not (out / index[run_id]["path"]).is_dir()]
    for run_id in tqdm.tqdm(missing, "exporting", disable=not sys.stderr.isatty()):
        folder = index[run_id]["path"]
        place = Hub(hub.license, hub.repo, folder)
        sae = interop.load(runs[run_id])
        interop.export(sae, format, out / folder, provenances[run_id], place, model)
        if not sys.stderr.isatty():
            logging.info("exported %s", folder)
    saes = list(index.values())
    _write_csv(saes, out / "index.csv")
    if unlike := unlike_evaluations(saes, "rows"):
        logging.warning(
            "of %s, %s; sae-jax eval --results makes them alike", out / "index.csv", unlike
        )
    models = {provenance.get("model_name") for provenance in provenances.values()}
    common = {"model_name": models.pop()} if len(models) == 1 and None not in models else {}
    title = f"Sparse autoencoders of {common.get('model_name', 'a language model')}"
    paths.write(out / "README.md", collection_card(title, format, saes, common, hub))
    return saes


def _folder_name(provenance: dict) -> str:
    sites = provenance["site"].replace(",", "+")
    if "target_site" in provenance:
        sites += f"-{provenance['target_site']}"
    sites = re.sub(r"[^\w.+-]", "_", sites) or "site"
    width = width_name(provenance["training"]["d_sae"])
    l0 = f"{provenance['l0']:.0f}" if "l0" in provenance else "unknown"
    return f"{sites}/width_{width}/average_l0_{l0}"


def width_name(width: int) -> str:
    """Returns a width as Gemma Scope names it: 16384 is 16k, 131072 is 131k, 1048576 is 1m."""
    for unit, size in (("m", 10**6), ("k", 10**3)):
        if width >= size:
            return f"{width // size}{unit}"
    return str(width)


def _free_name(path: str, taken: list[str]) -> str:
    number, name = 1, path
    while name in taken:
        number += 1
        name = f"{path}-{number}"
    return name


def _entry(run_id: str, provenance: dict) -> dict:
    """Returns a run's entry of the index, without its path.

    Its metrics are those of eval.json if there is one, else those of the run's own held-out rows.
    """
    evaluation = provenance.get("evaluation", {})
    return {
        "run_id": run_id,
        "architecture": provenance["training"]["architecture"],
        "site": provenance["site"],
        "width": provenance["training"]["d_sae"],
        "l0": evaluation.get("l0", provenance.get("l0")),
        "fvu": evaluation.get("fvu", provenance.get("eval_fvu")),
        "ce_recovered": evaluation.get("ce_recovered_zero"),
        "rows": evaluation.get("rows") if "fvu" in evaluation else provenance.get("eval_rows"),
    }


def _read_index(out: pathlib.Path, format: str) -> dict[str, dict]:
    """Returns the entries of the index in `out` by run_id, none if `out` is new."""
    file = out / "index.json"
    if not file.is_file():
        started = {file.with_name("index.json.tmp")}  # by an export that was stopped there
        if out.exists() and (not out.is_dir() or set(out.iterdir()) - started):
            raise UserError(f"{out} is there already and has no index.json; give a new directory")
        return {}
    index = checked(read_json(file), _Index, file)
    if index.format != format:
        raise UserError(
            f"{out} holds exports of the format {index.format}, not {format}; give another --out"
        )
    folders = [paths.inside(out, entry.path) for entry in index.saes]
    if len(set(folders)) < len(folders):
        raise UserError(f"{file} has two SAEs in one folder, so it is damaged")
    return {entry.run_id: dataclasses.asdict(entry) for entry in index.saes}


def _write_csv(saes: list[dict], file: pathlib.Path) -> None:
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(_Entry)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(saes)
    paths.write(file, text.getvalue())
