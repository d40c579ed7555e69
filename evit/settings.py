"""The settings of an EViT, as one record."""
import dataclasses
import itertools
import math
import operator

from evit.reorganization import SCORES, WAYS, paper_blocks


TOKEN_FLAGS = dict.fromkeys(('base_keep_rate', 'drop_loc', 'keep_schedule', 'token_counts', 'fuse_token', 'merge_token',
                             'token_way', 'token_score')).keys()            # an ordered set


@dataclasses.dataclass(frozen=True)
class TokenSettings:
    """How a model treats its tokens.

    Attributes:
        base_keep_rate: fraction of tokens that a reorganising block keeps, in (0, 1].
        drop_loc: numbers of the reorganising blocks, from 0; None for those of the way.
        way: what becomes of the other tokens, a name of `WAYS`.
        score: what ranks the tokens, a name of `SCORES`.
        uniform: reorganise in every block, at the rate that leaves as many tokens over all blocks (`uniform_rate`).
        token_counts: how many tokens leave each block, the class token and all others included, as in published
            schedules; instead of the rate and the blocks. At another image size, as large a part of them.
    Raises:
        ValueError: a rate or a name is not valid.
    """
    base_keep_rate: float = 0.7
    drop_loc: tuple | None = None
    way: str = 'drop'
    score: str = 'class_attention'
    uniform: bool = False
    token_counts: tuple | None = None

    def __post_init__(self):
        if not 0 < self.base_keep_rate <= 1:
            raise ValueError(f'the keep rate must lie in (0, 1], not {self.base_keep_rate}')
        for name, value, table in (('way', self.way, WAYS), ('score', self.score, SCORES)):
            if value not in table:
                raise ValueError(f'there is no {name} {value!r}, but {", ".join(table)}; one of your own must be in '
                                 f'the table {name.upper()}S')

    def updated(self, base_keep_rate=None, drop_loc=None, fuse_token=None, merge_token=None, uniform=None,
                token_counts=None, way=None, score=None):
        """These settings with those that are not None in their place.

        `fuse_token` and `merge_token` name the ways 'fuse' and 'merge'; False, where that was the way, names 'drop'. A
        rate or blocks take the place of token counts.
        """
        if fuse_token and merge_token:
            raise ValueError('tokens are either fused (fuse_token) or merged (merge_token); to merge where they are '
                             'fused, give fuse_token=False, --no-fuse-token')
        flags = {'fuse': fuse_token, 'merge': merge_token}
        for its_way, flag in flags.items():
            if flag and way not in (None, its_way):
                raise ValueError(f'way {way!r} and {its_way}_token=True exclude each other')
        if way is None:
            way = next((its_way for its_way, flag in flags.items() if flag), None)
        if way is None and flags.get(self.way) is False:
            way = 'drop'
        named = {'base_keep_rate': base_keep_rate, 'way': way, 'score': score, 'uniform': uniform,
                 'drop_loc': None if drop_loc is None else tuple(drop_loc),
                 'token_counts': token_counts and tuple(token_counts)}
        named = {name: value for name, value in named.items() if value is not None}
        if named.keys() & {'base_keep_rate', 'drop_loc', 'uniform'}:
            named.setdefault('token_counts', None)
        return dataclasses.replace(self, **named)

    @classmethod
    def of_flags(cls, flags, start=None):
        """The settings of a dict of flags, in which any of `TOKEN_FLAGS` may be missing or None.

        The others are those of `start`, the defaults without one. None if there is neither a flag nor a start.
        """
        named = {name: flags[name] for name in TOKEN_FLAGS if flags.get(name) is not None}
        if not named:
            return start
        renamed = {'token_way': 'way', 'token_score': 'score'}
        if 'keep_schedule' in named:
            named['uniform'] = named.pop('keep_schedule') == 'uniform'
        return (start or cls()).updated(**{renamed.get(name, name): value for name, value in named.items()})

    def flags(self):
        """A dict of all `TOKEN_FLAGS`."""
        return {'base_keep_rate': self.base_keep_rate, 'drop_loc': self.drop_loc, 'token_counts': self.token_counts,
                'keep_schedule': 'uniform' if self.uniform else 'stages', 'fuse_token': self.way == 'fuse',
                'merge_token': self.way == 'merge', 'token_way': self.way, 'token_score': self.score}

    def blocks(self, depth):
        """The numbers of the blocks that reorganise tokens at the keep rate; of `uniform` those that set its rate."""
        return WAYS[self.way].blocks(depth) if self.drop_loc is None else self.drop_loc

    def block_rates(self, keep_rate, depth, num_patches, dim):
        """The keep rate of each of `depth` blocks, if that of the model is `keep_rate`.

        Args:
            num_patches, dim: number of patches and width of the model.
        """
        block_rate = WAYS[self.way].block_rate
        if self.uniform and 0 < keep_rate < 1:
            blocks = paper_blocks(depth) if self.drop_loc is None else self.drop_loc
            return depth * [uniform_rate(depth, blocks, keep_rate)]
        if self.drop_loc is None and block_rate and 0 < keep_rate < 1:
            keep_rate = block_rate(depth, keep_rate, num_patches, dim)
        blocks = self.blocks(depth)
        return [keep_rate if i in blocks else 1. for i in range(depth)]

    def own_rates(self, depth, num_patches, num_prefix_tokens, dim):
        """The keep rate of each of `depth` blocks; ValueError if a block number or a count is out of range."""
        if self.token_counts:
            if len(self.token_counts) != depth:
                raise ValueError(
                    f'token_counts must have a number for each of {depth} blocks, not {len(self.token_counts)}')
            return rates_of_counts(self.token_counts, num_patches, num_prefix_tokens, WAYS[self.way].extra_tokens)
        if not all(0 <= i < depth for i in self.drop_loc or ()):
            raise ValueError(f'drop_loc {self.drop_loc} names a block outside 0 to {depth - 1}')
        return self.block_rates(self.base_keep_rate, depth, num_patches, dim)


def num_kept(num_tokens, keep_rate):
    """How many of `num_tokens` tokens a block of rate `keep_rate` keeps: k = ceil(rate · N), at most N (§3.2)."""
    return num_tokens if keep_rate >= 1 else math.ceil(keep_rate * num_tokens)


def uniform_rate(depth, drop_loc, keep_rate):
    """The rate that, in every block, leaves as many tokens over all blocks as `keep_rate` in the `drop_loc` blocks."""
    def tokens_per_patch(rate, blocks):
        return sum(itertools.accumulate((rate if i in blocks else 1. for i in range(depth)), operator.mul))

    target = tokens_per_patch(keep_rate, drop_loc)
    low, high = 0., 1.
    for _ in range(50):
        rate = (low + high) / 2
        low, high = (rate, high) if tokens_per_patch(rate, range(depth)) < target else (low, rate)
    return round(high, 12)                             # without the last bits, which could keep one more token


def rates_of_counts(counts, num_patches, num_prefix_tokens, extra_tokens):
    """The keep rate of each block that leaves `counts` tokens, prefix tokens and a fused one included.

    A block with fewer tokens keeps them all. ValueError if one would keep none.
    """
    rates, num_tokens = [], num_patches
    for count in counts:
        k = count - num_prefix_tokens - extra_tokens
        if count - num_prefix_tokens >= num_tokens:
            rates.append(1.)
        elif k < 1:
            raise ValueError(f'token_counts: {count} is too few, as {num_prefix_tokens + extra_tokens} of them are no '
                             'patches')
        else:
            # `num_kept` rounds up: without the small difference, k / N · N could be just above k, and keep k + 1
            rates.append((k - 1e-6) / num_tokens)
            num_tokens = k + extra_tokens
    return rates
