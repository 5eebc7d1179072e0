"""The Chinese words for flags, fields and commands, by name; `{default}` is replaced by the program's own default."""

CONSOLE = {
    "--history-max": "最多随问题一起发送多少轮历史，默认 {default}；0 为单轮对话",
    "--system": "系统提示词，默认 `{default}`",
}

VLLM_CLIENT = {
    "--url": "服务端地址；默认取 `$QWEN_URL`，没有则为 {default}",
    "--api-key": "服务端的密钥；默认取 `$QWEN_API_KEY`",
    "--test-message": "发一条消息，打印回答和耗时后退出；一切正常则退出码为 0。不写文字时用默认的问题",
}

VLLM_OFFLINE = {
    "--model": "模型目录或模型名；默认为演示模型",
    "--hub": "模型不是目录时从哪里下载，默认 {default}",
    "--revision": "该模型在那里的分支、标签或提交；会重新询问模型站",
    "--download-dir": "下载内容存放的目录",
    "--lora-modules": "LoRA 适配器",
    "--chat-template": "代替模型自带对话模板的 Jinja 文件",
    "--default-chat-template-kwargs": "另外传给对话模板的选项，如 `'{{\"preserve_thinking\": true}}'`",
    "--verbose": "同时显示 vLLM 的日志；日志总会写入 `~/.cache/qwen-vllm/offline.log`",
    "--prompt": "只回答这一个问题，然后退出",
    "--input": "要回答的 JSONL 文件，每行有 `query` 或 `messages`",
    "--output": "写入回答的 JSONL 文件；再次运行即可接着做",
    "--ordered": "结束时按输入的顺序排列回答",
    "--reference": "参考答案所在的字段，用于评分",
}

GRADIO_WEBUI = {
    "--server-url": "模型服务端的地址；默认取 `$QWEN_URL`，没有则为 {default}",
    "--api-key": "服务端的密钥；默认取 `$QWEN_API_KEY`",
    "--host": "监听地址，默认 {default}",
    "--port": "端口，默认 {default}",
    "--root-path": "反向代理提供页面的路径，如 `/chat`",
    "--ssl-certfile": "https 证书",
    "--ssl-keyfile": "证书的私钥",
    "--auth": "允许登录的用户和密码，可重复",
    "--auth-file": "同上，写在文件里，每行一个",
    "--title": "页面标题；默认为模型名",
    "--lang": "页面语言；默认随浏览器",
    "--concurrency": "同时回答的人数，默认 {default}",
    "--queue": "可以排队的人数，默认 {default}",
}

LIMITS = {
    "--max-body-size": "请求体的最大字节数；默认 1 MiB，上下文每个词元加 16 字节，模型能看图时再加 32 MiB",
    "--header-timeout": "必须在多少秒内收完请求头，默认 {default}",
    "--body-timeout": "必须在多少秒内收完请求体，默认 {default}",
    "--write-timeout": "客户端多少秒不接收数据就断开，默认 {default}",
    "--sleep-after": "多少分钟没有请求后，引擎交还 GPU 显存，默认 {default}；0 为从不",
    "--stall-timeout": "引擎一步最多用多少秒，超过则服务端退出，默认 {default}；0 为不限",
}

FIELDS = {
    "query": "用户这一次说的话",
    "history": "之前的各轮，从旧到新：`[[用户, 助手], …]`；模型会读思考时可为 `[用户, 助手, 思考]`",
    "system": "系统提示词，说明模型应当怎样回答；null 表示没有 system 消息",
    "stream": "边生成边返回，每行一个 JSON",
    "keep_alive": "流式返回时，第一个词元到来之前每 15 秒一行：在队列里的位置",
    "max_tokens": "回答最多有多少词元",
    "temperature": "温度；0 总是取概率最大的词元",
    "top_p": "只在累计概率达到此值的最可能词元中采样",
    "top_k": "只在概率最大的这么多个词元中采样；0 或 -1 为不限",
    "min_p": "词元概率与最大概率之比的下限",
    "repetition_penalty": "大于 1 时抑制提示词和回答中出现过的词元",
    "presence_penalty": "大于 0 时抑制回答中出现过的词元",
    "frequency_penalty": "同上，出现次数越多抑制越强",
    "seed": "随机种子，使采样可以重现",
    "stop": "停止词：遇到即结束回答，本身不出现在回答中",
    "model": "模型或 LoRA 适配器的名字",
    "enable_thinking": "让会思考的模型（Qwen3）先思考，或不思考",
    "reasoning_effort": "思考的深度，用于分级的模型（Qwen3.8：low、medium、xhigh）",
    "thinking_budget": "思考最多用多少词元（计入 max_tokens）；用完即开始回答",
}

TYPES = {"string": "字符串", "integer": "整数", "number": "数", "boolean": "布尔值", "array": "列表"}

COMMANDS = {
    "/help": "列出这些命令",
    "/clear": "开始新的对话",
    "/system [TEXT]": "查看或设置系统提示词",
    "/history": "查看对话",
    "/set [NAME VALUE]": "查看或设置采样参数；不写 VALUE 则恢复默认值",
    "/model [NAME]": "列出模型，或选用其中一个（LoRA 适配器）",
    "/effort [LEVEL]": "查看或设置思考的深度，用于分级的模型（Qwen3.8）",
    "/image [FILE]": "给下一个问题附上图片，或列出已附上的图片",
    "/regen": "重新回答上一个问题",
    "/save FILE": "把对话保存到文件",
    "/load FILE": "接着文件里的对话继续",
    "/exit": "退出（也可按 Ctrl-D）",
}
