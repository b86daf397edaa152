"""Gives each token of a text the label of its document, such as a language or a source."""

import dataclasses

import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError, some


@dataclasses.dataclass(frozen=True)
class DocumentLabels:
    """The labels of the documents that a text was packed of.

    Attributes:
      names: the labels, sorted.
      codes: the label of each token, as a place in `names`, (n, T) int32; -1 for BOS, which is of
        no document.
      documents: the number of its document, (n, T) int32; -1 for BOS.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    documents: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """Returns which tokens are of documents with a label, (n, T) bool.

        Raises UserError if there is no such label.
        """
        if name not in self.names:
            raise UserError(f"no document has the label {name!r}; there are {some(self.names)}")
        return self.codes == self.names.index(name)


def document_labels(
    sources,
    tokenizer: lm.Tokenizer,
    tokens: np.ndarray,
    numbers: np.ndarray | None = None,
    *,
    label_field: str = "label",
    field: str = "text",
    collapse_newlines: bool = False,
) -> DocumentLabels:
    """Returns the label of the document of each token of a text that `lm.pack` packed.

    The documents are packed again, by the same rules, and must give the same tokens.

    Args:
      sources: the documents, as for `lm.read_labelled`; those of a harvest are its `text`.
      tokenizer: the tokenizer.
      tokens: the sequences, (n, T), of which `Activity.tokens` are an example.
      numbers: the number of each among all that the documents give, (n,). None: the first n.
      label_field: the field of a document that has its label.
      field: the field that has its text.
      collapse_newlines: whether several newlines became one.

    Raises UserError if the documents give other tokens or have no labels, and as
    `lm.read_labelled` does.
    """
    numbers = np.arange(len(tokens)) if numbers is None else np.asarray(numbers)
    labels = []

    def texts():
        for text, label in lm.read_labelled(sources, label_field, field, collapse_newlines):
            labels.append(label)
            yield text

    length = tokens.shape[1]
    wanted = (int(numbers.max(initial=0)) + 1) * length
    packed, documents = lm.pack_documents(texts(), tokenizer, length, wanted)
    if packed.size < wanted:
        raise UserError(
            f"the labelled documents give {len(packed)} sequences of {length} tokens, and the text "
            f"that was looked at has sequence {numbers.max()}; give all documents of that text"
        )
    other = np.flatnonzero((packed[numbers] != tokens).any(axis=1))
    if len(other):
        raise UserError(
            f"the labelled documents are another text: sequence {numbers[other[0]]} and "
            f"{len(other) - 1} more have other tokens; give the documents that were harvested, in "
            "their order"
        )
    names, codes = np.unique(np.array(labels, object).astype(str), return_inverse=True)
    documents = documents[numbers]
    codes = np.append(codes, -1)[documents].astype(np.int32)
    return DocumentLabels(tuple(names.tolist()), codes, documents)
