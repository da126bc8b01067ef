"""POST /tokenize and /detokenize."""

from __future__ import annotations

from octavo.errors import InvalidRequestError
from octavo.server.answers import DetokenizeAnswer, TokenizeAnswer
from octavo.server.cancellation import Cancellation
from octavo.server.http import Exchange
from octavo.server.parsing import parse
from octavo.server.prompts import ChatPrompt
from octavo.server.protocol import DetokenizeFields, TokenizeFields
from octavo.server.service import Service


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Token ids of a prompt, or of the prompt that messages become."""
    fields = parse(await service.read_json(exchange), TokenizeFields)
    service.model_name(fields.model)
    tokenizer, capacity = service.require_ready()
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("Give either prompt or messages.", param="prompt")
    async with Cancellation(service, exchange):
        if fields.messages is None:
            ids = await service.prompts.encode_text(
                fields.prompt or "",
                tokenizer,
                capacity,
                add_special_tokens=fields.add_special_tokens is not False,
            )
        else:
            if fields.add_special_tokens:
                raise InvalidRequestError(
                    "add_special_tokens is not supported with messages: "
                    "a chat template writes them itself.",
                    param="add_special_tokens",
                )
            prompt = ChatPrompt(
                fields.messages,
                fields.chat_template_kwargs,
                add_generation_prompt=fields.add_generation_prompt,
                continue_final_message=fields.continue_final_message,
            )
            ids = await service.prompts.encode_chat(prompt, tokenizer, capacity)
    texts = [tokenizer.token_text(i) for i in ids] if fields.return_token_strs else None
    await exchange.answer_json(TokenizeAnswer(len(ids), capacity.max_model_len, ids, texts))


async def detokenize(service: Service, exchange: Exchange) -> None:
    """Text of token ids."""
    fields = parse(await service.read_json(exchange), DetokenizeFields)
    service.model_name(fields.model)
    tokenizer, capacity = service.require_ready()
    text = await service.prompts.decode(
        fields.tokens, tokenizer, capacity, skip_special_tokens=fields.skip_special_tokens
    )
    await exchange.answer_json(DetokenizeAnswer(text))
