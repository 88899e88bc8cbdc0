-- SPDX-License-Identifier: Apache-2.0
-- Neovim as an independent msgpack-RPC client:  nvim --headless -u NONE -l is not in 0.7, so
--   nvim --headless -u NONE -c 'luafile tests/test_server_nvim.lua'   with POLDER_ADDRESS and POLDER_UNIX set.
-- Every line of the form "ok: ..." is a claim that held; the last line is "nvim: all good".

local function say(text)
  io.stdout:write(text .. "\n")
end

local function claim(holds, what)
  if not holds then
    say("FAILED: " .. what)
    vim.cmd("cquit 1")
  end
  say("ok: " .. what)
end

local function run(kind, address)
  local channel = vim.fn.sockconnect(kind, address, { rpc = true })
  claim(channel > 0, kind .. ": sockconnect")
  local hello = vim.rpcrequest(channel, "hello", { client = "nvim" })
  claim(hello.protocol == 1, kind .. ": hello")
  local fine, message = pcall(vim.rpcrequest, channel, "generate", { prompt = "a" })
  claim(not fine and message:find("unauthenticated: call auth with a key first", 1, true),
    kind .. ": the sentence of an exception is shown")
  claim(vim.rpcrequest(channel, "auth", { key = "key-acme" }).tenant == "acme", kind .. ": auth")
  claim(vim.rpcrequest(channel, "ping") == "pong", kind .. ": a call without parameters")
  local answer = vim.rpcrequest(channel, "generate", { prompt = "abc", max_tokens = 6 })
  claim(answer.text == "abcabc" and answer.finish_reason == "length", kind .. ": generate")
  fine, message = pcall(vim.rpcrequest, channel, "generate", { prompt = "a", max_tokens = 0 })
  claim(not fine and message:find("invalid_argument: max_tokens must be", 1, true),
    kind .. ": the sentence of a validation error is shown")
  -- Neovim takes our notifications for calls of its own functions, and tells us that it has none of that
  -- name: harmless, and the answer carries the whole text.
  answer = vim.rpcrequest(channel, "generate", { prompt = "abc", max_tokens = 9, stream = true })
  claim(answer.text == "abcabcabc", kind .. ": generate, streamed")
  vim.rpcnotify(channel, "cancel", { id = 12345 })
  claim(#vim.rpcrequest(channel, "tokenize", { text = "hello" }).tokens == 5, kind .. ": tokenize")
  claim(vim.rpcrequest(channel, "models")[1].id == "demo", kind .. ": models")
  vim.fn.chanclose(channel)
end

local fine, problem = pcall(function()
  run("tcp", os.getenv("POLDER_ADDRESS"))
  run("pipe", os.getenv("POLDER_UNIX"))
end)
if not fine then
  say("FAILED: " .. tostring(problem))
  vim.cmd("cquit 1")
end
say("nvim: all good")
vim.cmd("qall!")
