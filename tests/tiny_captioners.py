"""Tiny random captioners in transformers' layout: they see 32 px images and write nonsense of a few words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)

WORDS = ("a", "horse", "photo", "of", "red", "blue", "cat", "on", "the", "mat", "in", "snow", "give", "this", ",", ".")
SIDE_PX = 32
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE_PX,
    "patch_size": 16,
}
_KOSMOS_IMAGE_TOKENS = 64
_QUERIES = 3


def build_tiny_blip(folder: Path, seed: int = 0) -> Path:
    """Write a random BLIP whose texts depend on the image."""
    torch.manual_seed(seed)
    tokenizer = _bert_tokenizer(["[DEC]"])
    names = tokenizer.get_vocab()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": names["[DEC]"],
        "sep_token_id": names["[SEP]"],
        "eos_token_id": names["[SEP]"],
        "pad_token_id": names["[PAD]"],
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_VISION, projection_dim=16))
    _enliven(model)
    model.save_pretrained(folder)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return folder


def build_tiny_git(folder: Path, seed: int = 0) -> Path:
    """Write a random GIT whose texts depend on the image."""
    torch.manual_seed(seed)
    tokenizer = _bert_tokenizer([])
    names = tokenizer.get_vocab()
    config = GitConfig(
        vision_config=_VISION,
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=names["[CLS]"],
        eos_token_id=names["[SEP]"],
        pad_token_id=names["[PAD]"],
    )
    model = GitForCausalLM(config)
    _enliven(model)
    model.save_pretrained(folder)
    GitProcessor(_clip_images(), tokenizer).save_pretrained(folder)
    return folder


def build_tiny_blip2(folder: Path, language: str = "opt", seed: int = 0) -> Path:
    """Write a random BLIP-2 around an OPT or a T5, whose texts depend on the image."""
    torch.manual_seed(seed)
    vocabulary = {piece: n for n, piece in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "</s> $A" if language == "opt" else "$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="</s>", eos_token="</s>", unk_token="<unk>"
    )
    processor = Blip2Processor(BlipImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX}), tokenizer, _QUERIES)
    shared = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    opt = {
        "model_type": "opt",
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
    }
    t5 = {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
    }
    former = {
        "vocab_size": 8,
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Blip2Config(
        vision_config=_VISION,
        qformer_config=former,
        text_config=shared | (opt if language == "opt" else t5),
        num_query_tokens=_QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    _enliven(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_tiny_kosmos2(folder: Path, seed: int = 0) -> Path:
    """Write a random Kosmos-2; its vocabulary has tags and patches, which it writes too."""
    torch.manual_seed(seed)
    images = [f"<image_{n}>" for n in range(_KOSMOS_IMAGE_TOKENS)]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *images, *("▁" + word for word in WORDS), "▁", *"abcdefghi:,.", "<mask>"]
    tokenizer = XLMRobertaTokenizer(vocab=[(piece, -1.0) for piece in pieces])
    processor = Kosmos2Processor(_clip_images(), tokenizer, num_patch_index_tokens=4)
    processor.num_image_tokens = _KOSMOS_IMAGE_TOKENS
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 128,
        "embed_dim": 16,
        "layers": 1,
        "ffn_dim": 32,
        "attention_heads": 2,
        "dropout": 0.0,
    }
    config = Kosmos2Config(text_config=text, vision_config=_VISION, latent_query_num=_KOSMOS_IMAGE_TOKENS)
    model = Kosmos2ForConditionalGeneration(config)
    _enliven(model, gain=6.0, embedding=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _bert_tokenizer(more: list[str]) -> BertTokenizer:
    vocabulary = {piece: n for n, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocabulary)
    if more:
        tokenizer.add_special_tokens({"additional_special_tokens": more})
    return tokenizer


def _clip_images() -> CLIPImageProcessor:
    size = {"height": SIDE_PX, "width": SIDE_PX}
    return CLIPImageProcessor(size=size, crop_size=size)


def _enliven(model: torch.nn.Module, *, gain: float = 2.0, embedding: float = 2.0) -> None:
    """Make the texts depend on the image, which a fresh initialisation hardly does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = embedding if "embed_tokens" in name else gain
                torch.nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)
