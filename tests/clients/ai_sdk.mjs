// The AI SDK, asked in one way.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';
import { apiKey, run, streamed, url, weather, withTools } from './case.mjs';

const model = createOpenAICompatible({ name: 'qwen', baseURL: `${url}/v1`, apiKey })('Scripted');
const { description, schema, call } = weather;
const tools = { get_weather: tool({ description, inputSchema: jsonSchema(schema), execute: call }) };

await run(async () => {
  const asked = { model, prompt: '?', onError: ({ error }) => { throw error; } };
  if (withTools) Object.assign(asked, { tools, stopWhen: stepCountIs(3) });
  if (!streamed) return (await generateText(asked)).text;
  let said = '';
  for await (const text of streamText(asked).textStream) said += text;
  return said;
});
