"""The settings of an EViT, as one record."""
import dataclasses
import itertools
import math
import operator

from evit.reorganization import SCORES, WAYS


TOKEN_FLAGS = dict.fromkeys(('base_keep_rate', 'drop_loc', 'keep_schedule', 'token_counts', 'fuse_token', 'merge_token',
                             'token_way', 'token_score')).keys()            # an ordered set


@dataclasses.dataclass(frozen=True)
class TokenSettings:
    """How a model treats its tokens.

    Attributes:
        base_keep_rate: fraction of tokens that a reorganising block keeps, in (0, 1].
        drop_loc: numbers of the reorganising blocks, from 0; None for those of `default_blocks`.
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
                raise ValueError(f'there is no {name} {value!r}, but {", ".join(table)}')

    def updated(self, base_keep_rate=None, drop_loc=None, fuse_token=None, merge_token=None, uniform=None,
                token_counts=None, way=None, score=None):
        """These settings with those that are not None in their place.

        `fuse_token` and `merge_token` name the ways 'fuse' and 'merge'; False, where that was the way, names 'drop'. A
        rate or blocks take the place of token counts.
        """
        if fuse_token and merge_token:
            raise ValueError('tokens are either fused (fuse_token) or merged (merge_token)')
        for flag, its_way in ((fuse_token, 'fuse'), (merge_token, 'merge')):
            if flag and way not in (None, its_way):
                raise ValueError(f'way {way!r} and {its_way}_token=True exclude each other')
            way = its_way if flag else 'drop' if flag is False and way is None and self.way == its_way else way
        counts, blocks = self.token_counts, self.drop_loc
        if counts and any(value is not None for value in (base_keep_rate, drop_loc, uniform)):
            counts = blocks = None                     # the blocks were those of the counts
        named = {'base_keep_rate': base_keep_rate, 'way': way, 'score': score, 'uniform': uniform,
                 'token_counts': counts if token_counts is None else tuple(token_counts),
                 'drop_loc': blocks if drop_loc is None else tuple(drop_loc)}
        return dataclasses.replace(self, **{name: value for name, value in named.items() if value is not None
                                            or name in ('token_counts', 'drop_loc')})

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

    def at_depth(self, depth, num_patches, num_prefix_tokens):
        """The settings with the numbers of their blocks, and the keep rate of each of `depth` blocks.

        Raises:
            ValueError: a block number or a count is out of range.
        """
        if self.token_counts:
            if len(self.token_counts) != depth:
                raise ValueError(
                    f'token_counts must have a number for each of {depth} blocks, not {len(self.token_counts)}')
            rates = rates_of_counts(self.token_counts, num_patches, num_prefix_tokens, WAYS[self.way].extra_tokens)
            return dataclasses.replace(self, drop_loc=tuple(i for i, rate in enumerate(rates) if rate < 1)), rates
        settings = self
        if self.drop_loc is None:
            settings = dataclasses.replace(self, drop_loc=default_blocks(depth))
        if not all(0 <= i < depth for i in settings.drop_loc):
            raise ValueError(f'drop_loc {settings.drop_loc} names a block outside 0 to {depth - 1}')
        return settings, settings.rates(depth, settings.base_keep_rate)

    def rates(self, depth, keep_rate):
        """The keep rate of each of `depth` blocks, if that of the reorganising ones is `keep_rate`."""
        if self.uniform and 0 < keep_rate < 1:
            return depth * [uniform_rate(depth, self.drop_loc, keep_rate)]
        return [keep_rate if i in self.drop_loc else 1. for i in range(depth)]


def default_blocks(depth):
    """After a quarter, a half and three quarters of the blocks, as in the paper (3, 6 and 9 of 12)."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


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
            # `num_kept` rounds up: without the small difference, k / N · N could be a little more than k, and keep k + 1
            rates.append((k - 1e-6) / num_tokens)
            num_tokens = k + extra_tokens
    return rates
