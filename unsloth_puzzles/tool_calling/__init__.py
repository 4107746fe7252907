"""Tool calling: a box of Python functions, chat formats, training tokens with labels, and the loop of turns.

toolbox.ToolBox                         functions, their schemas, and calls of them that are checked and bounded
formats.chat_format                     "qwen2.5", "qwen3" or "llama3.2": the template, and how a reply is read
tokens.tokenize_conversation            token ids, and labels on the assistant's turns only
conversation.run_conversation           generate, call, answer, until the model has no more calls
"""
