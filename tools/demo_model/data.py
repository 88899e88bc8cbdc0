# SPDX-License-Identifier: Apache-2.0
"""Token arrays on the device, and batches drawn from them without waiting for the host."""
import io
import lzma
import os

import numpy as np
import torch

# Share of each kind in a base batch: set so that no kind is read more than about 30 times in a
# billion tokens, and code, documentation and man pages get most of it.
BASE_SHARE = {"c": .23, "kernel-doc": .13, "man-en": .18, "man-de": .075, "man-fr": .065,
              "man-es": .03, "man-cs": .006, "man-uk": .03, "manuals": .14, "python": .10,
              "sayings": .045}
DOCUMENT_STARTS = 0.4  # share of windows that begin at the first token of a document


def read_tokens(folder):
    """{kind: (train, val, val_bytes)} from DIR/tokens.npz or DIR/tokens.npz.xz."""
    plain = os.path.join(folder, "tokens.npz")
    source = plain if os.path.exists(plain) else io.BytesIO(lzma.open(plain + ".xz").read())
    arrays = np.load(source)
    kinds = [name[:-6] for name in arrays.files if name.endswith(".train")]
    return {k: (arrays[k + ".train"], arrays[k + ".val"], int(arrays[k + ".val_bytes"]))
            for k in kinds}


class Batches:
    """Random windows of the training tokens of some kinds, in given shares."""

    def __init__(self, tokens, shares, window, device):
        self.kinds, self.window, self.device = list(shares), window, device
        self.shares = torch.tensor(list(shares.values()), device=device)
        train = [tokens[k][0].astype(np.int16) for k in self.kinds]
        self.ids = torch.from_numpy(np.concatenate(train)).to(device)
        first = np.cumsum([0] + [len(t) for t in train])
        room = [len(t) - window - 1 for t in train]
        starts = [np.concatenate([[0], np.flatnonzero(t == 0) + 1]) for t in train]
        starts = [np.minimum(s, r) for s, r in zip(starts, room)]
        self.first = torch.tensor(first[:-1], device=device)
        self.room = torch.tensor(room, device=device)
        self.start_count = torch.tensor([len(s) for s in starts], device=device)
        self.start_first = torch.tensor(np.cumsum([0] + [len(s) for s in starts])[:-1],
                                        device=device)
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)

    def draw(self, rows):
        """(inputs, targets, one-hot kinds) for a batch of rows windows."""
        kind = torch.multinomial(self.shares, rows, replacement=True)
        at_random = (torch.rand(rows, device=self.device) * self.room[kind]).long()
        which = (torch.rand(rows, device=self.device) * self.start_count[kind]).long()
        at_start = self.starts[self.start_first[kind] + which]
        begin = torch.rand(rows, device=self.device) < DOCUMENT_STARTS
        offset = self.first[kind] + torch.where(begin, at_start, at_random)
        index = offset[:, None] + torch.arange(self.window + 1, device=self.device)
        window = self.ids[index].long()
        one_hot = torch.nn.functional.one_hot(kind, len(self.kinds)).float()
        return window[:, :-1], window[:, 1:], one_hot
