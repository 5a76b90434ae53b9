"""New names that mean a trained one, and are taken as it before fine-tuning begins."""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.prompt import Confirm

from metr.data.datasets_file import DatasetSource
from metr.errors import MetrError
from metr.model import METR
from metr.processes import process_count
from metr.text.config import BUNDLED
from metr.text.same_names import SameName, known_aliases, listed, same_names
from metr.text.similar_names import EmbeddingSimilarity
from metr.text.vocabulary import Vocabulary

NameChoice = Literal["ask", "yes", "no"]
"""Whether new names that seem to mean a trained one are taken as it. `ask` is `no` where there is no terminal."""
Renames = Mapping[str, Mapping[str, str]]
"""By dataset, the trained name that each of some names is taken as."""
_logger = logging.getLogger(__name__)


def taken_names(
    sources: Sequence[DatasetSource],
    new: int,
    model: METR,
    choice: NameChoice,
    console: Console,
    kept: Renames | None = None,
) -> Renames:
    """Which names of these datasets are taken as a name that the checkpoint was trained on. Prints them.

    Names that an earlier fine-tuning took as a trained one are taken so again. If the choice is "no", this holds for
    old datasets alone, whose names were trained so; in new ones they are learnt as new names, which is printed.

    Args:
        sources: The datasets, new ones first.
        new: How many of them are new.
        model: The checkpoint.
        choice: Whether to take the names that seem to mean a trained one.
        console: Where to ask.
        kept: What a resumed run began with: taken for "ask", without another question.
    """
    if choice == "ask" and kept is not None:
        taken = {dataset: dict(names) for dataset, names in kept.items()}
    else:
        aliases = model.checkpoint.detection.aliases
        taken = {source.name: known_aliases(source.categories, aliases) for source in sources}
        if choice == "no":
            for source in sources[:new]:
                for name, trained in taken.pop(source.name).items():
                    message = f'{source.name}: "{name}" is learnt as a new name; until now it stood for "{trained}"'
                    console.print(message, highlight=False, markup=False, soft_wrap=True)
        else:
            for dataset, one in _chosen(_offers(sources, model, taken), choice, console):
                taken[dataset][one.name] = one.trained
    taken = {dataset: names for dataset, names in taken.items() if names}
    for dataset, names in taken.items():
        for name, trained in names.items():
            message = f'{dataset}: "{name}" is taken as "{trained}", which the checkpoint knows'
            console.print(message, highlight=False, markup=False, soft_wrap=True)
    return taken


def aliases_of(taken: Renames, earlier: Mapping[str, str], vocabulary: Vocabulary) -> dict[str, str]:
    """The names that were taken as a trained one, now and earlier, but for those that are names of their own."""
    now = {name: trained for names in taken.values() for name, trained in names.items()}
    return {name: trained for name, trained in (dict(earlier) | now).items() if name not in vocabulary}


def _offers(sources: Sequence[DatasetSource], model: METR, taken: Renames) -> list[tuple[str, SameName]]:
    """For each dataset, the names that seem to mean a trained one and are not taken as one yet."""
    embeddings = _embeddings(sources, model)
    offers = []
    for source in sources:
        known = taken[source.name]
        # what is taken as a trained name already is one
        names = [known.get(name, name) for name in source.categories]
        offers += [(source.name, one) for one in same_names(names, model.names, embeddings)]
    return offers


def _embeddings(sources: Sequence[DatasetSource], model: METR) -> EmbeddingSimilarity | None:
    """Embeddings of the trained and the new names; None unless they are the bundled language model's.

    The bound for names of the same meaning was chosen with that one.
    """
    if model.checkpoint.text_encoder.get("source") != BUNDLED:
        return None
    prompts = {name: phrase for source in sources for name, phrase in source.config.prompts.items()}
    new = [name for source in sources for name in source.categories if name not in model.vocabulary]
    names = tuple(dict.fromkeys((*model.names, *new)))
    kept = {**prompts, **model.vocabulary.prompts}
    try:
        return EmbeddingSimilarity(
            source=BUNDLED, names=names, vectors=model.embed(Vocabulary.of(names, _only(kept, names)), tell=False)
        )
    except MetrError as error:  # spelling alone is compared; training says what is missing, if it needs it
        _logger.info("names are compared by spelling alone: %s", error.what)
        return None


def _only(prompts: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    known = set(names)
    return {name: phrase for name, phrase in prompts.items() if name in known}


def _chosen(offers: Sequence[tuple[str, SameName]], choice: NameChoice, console: Console) -> list[tuple[str, SameName]]:
    """Those of the offers that are taken: asks, if it is to ask and somebody can answer."""
    if choice == "yes" or not offers:
        return list(offers)
    if console.quiet or process_count() > 1 or sys.stdin is None or not sys.stdin.isatty():
        message = "names that seem to mean trained ones are learnt as new names: %s; --same-names yes takes them as one"
        _logger.warning(message, listed([one for _, one in offers]))
        return []
    taken = []
    questions = {
        True: "The checkpoint knows names in another spelling",
        False: "Perhaps it knows these by other names",
    }
    for by_spelling, what in questions.items():
        some = [(dataset, one) for dataset, one in offers if one.by_spelling == by_spelling]
        if some:
            question = f"{what}: {', '.join(str(one) for _, one in some)}. Take them as one?"
            if _confirmed(question, console, default=by_spelling):
                taken += some
    return taken


def _confirmed(question: str, console: Console, *, default: bool) -> bool:
    try:
        return Confirm.ask(escape(question), console=console, default=default)
    except EOFError:  # nobody answers
        return default
