// Anthropic's SDK for JavaScript, asked in one way.
import Anthropic from '@anthropic-ai/sdk';
import { apiKey, run, streamed, url, weather, withTools } from './case.mjs';

const client = new Anthropic({ baseURL: url, apiKey });
const messages = [{ role: 'user', content: '?' }];
const asked = { model: 'Scripted', max_tokens: 300, messages };

async function answer() {
  if (streamed) return client.messages.stream(asked).finalMessage();
  return client.messages.create(asked);
}

await run(async () => {
  if (withTools) {
    asked.tools = [{ name: 'get_weather', description: weather.description, input_schema: weather.schema }];
    const { content } = await answer();
    const results = content
      .filter((block) => block.type === 'tool_use')
      .map((block) => ({ type: 'tool_result', tool_use_id: block.id, content: weather.call(block.input) }));
    messages.push({ role: 'assistant', content }, { role: 'user', content: results });
  }
  const { content } = await answer();
  return content.at(-1).text;
});
