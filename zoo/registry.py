"""The papers that are implemented, and the table of them in the README.

``python -m zoo.registry`` prints the table, ``--write README.md`` puts it between the file's markers, ``--check
README.md`` fails where the file holds another one.
"""

import argparse
import pathlib
import sys
from typing import NamedTuple

START, END = "<!-- papers -->", "<!-- /papers -->"


class Paper(NamedTuple):
    """A paper, and what of it is here."""

    title: str
    authors: str
    year: int
    arxiv: str
    file: str
    implements: str
    models: tuple[str, ...]  # stacks of `zoo.create.STACKS`; none where it is something around any stack
    experiments: tuple[str, ...] = ()  # names of `python -m experiments`


AAREN_STUDY = ("aaren_reinforcement", "aaren_events", "aaren_forecasting", "aaren_classification", "aaren_efficiency")

PAPERS = (
    Paper(
        title="Attention as an RNN",
        authors="Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori",
        year=2024,
        arxiv="2405.13956",
        file="zoo/token_mixers/aaren.py",
        implements="Aaren: prefix-scan attention with a learned query; parameter counts of the paper",
        models=("aaren",),
        experiments=(*AAREN_STUDY, "aaren_recall", "mqar", "byte_language_models", "compile_language_models"),
    ),
    Paper(
        title="Attention Is All You Need",
        authors="Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin",
        year=2017,
        arxiv="1706.03762",
        file="zoo/token_mixers/transformer.py",
        implements="causal self-attention with a cache, as the baseline",
        models=("transformer",),
        experiments=(*AAREN_STUDY, "aaren_recall", "mqar", "byte_language_models"),
    ),
    Paper(
        title="Scaling TransNormer to 175 Billion Parameters",
        authors="Qin, Li, Sun, Sun, Shen, Han, Wei, Lv, Yuan, Luo, Qiao, Zhong",
        year=2023,
        arxiv="2307.14995",
        file="zoo/token_mixers/transnormer_llm.py",
        implements="TransNormerLLM: decayed linear attention, LRPE-d, gates, SGLU, SRMSNorm",
        models=("transnormer_llm",),
        experiments=("compile_language_models", "mqar", "byte_language_models"),
    ),
    Paper(
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        authors="Qin, Sun, Li, Shen, Sun, Zhong",
        year=2024,
        arxiv="2405.17381",
        file="zoo/token_mixers/lightning_attention.py",
        implements="TNL, on linear attention in blocks",
        models=("tnl",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        authors="Qin, Sun, Li, Shen, Sun, Zhong",
        year=2024,
        arxiv="2401.04658",
        file="zoo/token_mixers/lightning_attention.py",
        implements="its blocks, forward and backward, as the test of `linear_attention`",
        models=("tnl",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        authors="Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Ré",
        year=2024,
        arxiv="2402.18668",
        file="zoo/token_mixers/based.py",
        implements="Based: Taylor linear attention, sliding windows, gated convolutions",
        models=("based",),
        experiments=("compile_language_models", "mqar", "byte_language_models"),
    ),
    Paper(
        title="Zoology: Measuring and Improving Recall in Efficient Language Models",
        authors="Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré",
        year=2023,
        arxiv="2312.04927",
        file="zoo/token_mixers/base_convolution.py",
        implements="BaseConv; multi-query associative recall",
        models=("base_convolution",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        authors="Qin, Mao, Shen, Li, Zhang, Dai, Zhong",
        year=2024,
        arxiv="2405.21022",
        file="zoo/token_mixers/lightnet.py",
        implements="LightNet: additive recurrence, causal or in one scan over a grid; TPE, LRPE",
        models=("lightnet",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
        authors="Wei, Yadav, Pascanu, Gulcehre",
        year=2025,
        arxiv="2507.04416",
        file="zoo/token_mixers/rat.py",
        implements="RAT: a gated recurrence inside chunks, attention across them",
        models=("rat",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
        authors="Acharya",
        year=2025,
        arxiv="2509.00605",
        file="zoo/token_mixers/gated_associative_memory.py",
        implements="GAM: a short convolution and a static learned bank; parameter count of the paper",
        models=("gated_associative_memory",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        authors="Wu, Wu, Xu, Wang, Long",
        year=2022,
        arxiv="2202.06258",
        file="zoo/token_mixers/flowformer.py",
        implements="Flow-Attention, causal and among all tokens",
        models=("flowformer",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        authors="Ramapuram, Danieli, Dhekane, Weers, Busbridge, Ablin, Likhomanenko, Digani, Gu, Shidani, Webb",
        year=2024,
        arxiv="2409.04431",
        file="zoo/token_mixers/sigmoid_attention.py",
        implements="sigmoid attention and its stabilisers",
        models=("sigmoid_attention",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        authors="Jin, Zhu, Yuan, Yan",
        year=2024,
        arxiv="2410.11842",
        file="zoo/token_mixers/mixture_of_head_attention.py",
        implements="heads shared or routed; the load balance in the state",
        models=("moh",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models",
        authors="Lin, Tang, Liu, Gong, Cheng, Chen and others",
        year=2025,
        arxiv="2501.13629",
        file="zoo/token_mixers/sigma.py",
        implements="DiffQKV: fewer key heads than value heads, augmented queries",
        models=("sigma",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks",  # noqa: E501
        authors="Sieber, Alonso, Didier, Zeilinger, Orvieto",
        year=2024,
        arxiv="2405.15731",
        file="primitives/dynamical_systems.py",
        implements="attention, state spaces and gated RNNs as one linear system, tested to be equal",
        models=(),
    ),
    Paper(
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        authors="Gu, Dao",
        year=2023,
        arxiv="2312.00752",
        file="zoo/token_mixers/mamba.py",
        implements="the Mamba block",
        models=("mamba",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",  # noqa: E501
        authors="Dao, Gu",
        year=2024,
        arxiv="2405.21060",
        file="zoo/token_mixers/mamba2.py",
        implements="the Mamba-2 block",
        models=("mamba2",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="On the Parameterization and Initialization of Diagonal State Space Models",
        authors="Gu, Gupta, Goel, Ré",
        year=2022,
        arxiv="2206.11893",
        file="zoo/token_mixers/s4d.py",
        implements="S4D with its three starts",
        models=("s4d",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Simplified State Space Layers for Sequence Modeling",
        authors="Smith, Warrington, Linderman",
        year=2022,
        arxiv="2208.04933",
        file="zoo/token_mixers/s5.py",
        implements="the S5 layer",
        models=("s5",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Resurrecting Recurrent Neural Networks for Long Sequences",
        authors="Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De",
        year=2023,
        arxiv="2303.06349",
        file="zoo/token_mixers/lru.py",
        implements="the LRU",
        models=("lru",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Were RNNs All We Needed?",
        authors="Feng, Tung, Ahmed, Bengio, Hajimirsadeghi",
        year=2024,
        arxiv="2410.01201",
        file="zoo/token_mixers/minimal_rnns.py",
        implements="minGRU and minLSTM",
        models=("min_gru", "min_lstm"),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="A Critical Review of Recurrent Neural Networks for Sequence Learning",
        authors="Lipton, Berkowitz, Elkan",
        year=2015,
        arxiv="1506.00019",
        file="zoo/token_mixers/recurrent_networks.py",
        implements="Elman and Jordan networks, LSTM, GRU, both directions",
        models=("elman", "jordan", "lstm", "gru"),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        authors="Yang, Wang, Zhang, Shen, Kim",
        year=2024,
        arxiv="2406.06484",
        file="zoo/token_mixers/deltanet.py",
        implements="DeltaNet",
        models=("deltanet",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        authors="Yang, Kautz, Hatamizadeh",
        year=2024,
        arxiv="2412.06464",
        file="zoo/token_mixers/gated_deltanet.py",
        implements="Gated DeltaNet",
        models=("gated_deltanet",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        authors="Kimi Team",
        year=2025,
        arxiv="2510.26692",
        file="zoo/token_mixers/kimi_delta_attention.py",
        implements="Kimi Delta Attention, and its 3 : 1 pattern with attention",
        models=("kimi_linear",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Retentive Network: A Successor to Transformer for Large Language Models",
        authors="Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei",
        year=2023,
        arxiv="2307.08621",
        file="zoo/token_mixers/retnet.py",
        implements="multi-scale retention",
        models=("retnet",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        authors="Yang, Wang, Shen, Panda, Kim",
        year=2023,
        arxiv="2312.06635",
        file="zoo/token_mixers/gated_linear_attention.py",
        implements="linear attention with a decay for each key channel",
        models=("gated_linear_attention",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
        authors="Qin, Yang, Zhong",
        year=2023,
        arxiv="2311.04823",
        file="zoo/token_mixers/hgrn.py",
        implements="complex gated recurrence with lower-bounded forget gates",
        models=("hgrn",),
        experiments=("mqar", "byte_language_models"),
    ),
    Paper(
        title="Titans: Learning to Memorize at Test Time",
        authors="Behrouz, Zhong, Mirrokni",
        year=2025,
        arxiv="2501.00663",
        file="zoo/token_mixers/titans.py",
        implements="a memory that learns as it reads: alone (LMM), and as context (MAC), gate (MAG), layer (MAL)",
        models=("titans_lmm", "titans_mac", "titans_mag", "titans_mal"),
        experiments=("needle_in_a_haystack", "memory_ablations", "forecasting", "byte_language_models"),
    ),
    Paper(
        title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization",  # noqa: E501
        authors="Behrouz, Razaviyayn, Zhong, Mirrokni",
        year=2025,
        arxiv="2504.13173",
        file="zoo/token_mixers/miras.py",
        implements="Miras: Moneta, Yaad, Memora",
        models=("moneta", "yaad", "memora"),
        experiments=("needle_in_a_haystack", "memory_ablations", "forecasting", "byte_language_models"),
    ),
    Paper(
        title="Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
        authors="Sun, Li, Dalal, Xu, Vikram, Zhang, Dubois, Chen, Wang, Koyejo, Hashimoto, Guestrin",
        year=2024,
        arxiv="2407.04620",
        file="zoo/token_mixers/ttt.py",
        implements="TTT-Linear and TTT-MLP",
        models=("ttt_linear", "ttt_mlp"),
        experiments=("needle_in_a_haystack", "byte_language_models"),
    ),
    Paper(
        title="Decision Transformer: Reinforcement Learning via Sequence Modeling",
        authors="Chen, Lu, Rajeswaran, Lee, Grover, Laskin, Abbeel, Srinivas, Mordatch",
        year=2021,
        arxiv="2106.01345",
        file="zoo/decision_transformer.py",
        implements="the next action from returns-to-go, observations and actions, around any stack (`STACK_policy`)",
        models=(),
        experiments=("aaren_reinforcement", "aaren_efficiency"),
    ),
    Paper(
        title="Intensity-Free Learning of Temporal Point Processes",
        authors="Shchur, Biloš, Günnemann",
        year=2020,
        arxiv="1909.12127",
        file="zoo/point_process.py",
        implements="log-normal mixtures of the time of the next event, around any stack (`STACK_point_process`)",
        models=(),
        experiments=("aaren_events", "aaren_efficiency"),
    ),
)


def render(papers: tuple[Paper, ...] = PAPERS) -> str:
    """The table in Markdown."""
    rows = ["| paper | implemented | models | experiments |", "|---|---|---|---|"]
    for paper in papers:
        source = f"{paper.authors} ({paper.year}), [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        rows.append(
            f"| [{paper.title}]({paper.file}): {source} | {paper.implements} "
            f"| {_code(paper.models)} | {_code(paper.experiments)} |"
        )
    return "\n".join(rows)


def _code(names):
    return ", ".join(f"`{name}`" for name in names)


def insert(text: str, table: str) -> str:
    """The text with the table between its markers; `ValueError` where it has none."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"expected the markers {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Print, write or check the table."""
    parser = argparse.ArgumentParser(prog="python -m zoo.registry", description="The table of implemented papers.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", metavar="FILE", type=pathlib.Path, help="put the table between the file's markers")
    mode.add_argument("--check", metavar="FILE", type=pathlib.Path, help="fail where the file holds another table")
    options = parser.parse_args(arguments)
    path = options.write or options.check
    if path is None:
        print(render())
        return 0
    try:
        text = path.read_text(encoding="utf-8")
        expected = insert(text, render())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    if options.write:
        path.write_text(expected, encoding="utf-8")
    elif text != expected:
        print(f"{path}: the table of papers is out of date; run python -m zoo.registry --write {path}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
