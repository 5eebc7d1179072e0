// Anthropic's SDK for JavaScript, asked in one way: node anthropic_sdk.mjs CASE URL KEY. Prints as python_clients.py does.
import Anthropic from '@anthropic-ai/sdk';

const [wanted, url, apiKey] = process.argv.slice(2);
const called = [];
const answer = { said: '', called, error: '' };
const client = new Anthropic({ baseURL: url, apiKey });
const messages = [{ role: 'user', content: '?' }];
const asked = { model: 'Scripted', max_tokens: 300, messages };
const inputSchema = {
  type: 'object',
  properties: {
    city: { type: 'string' },
    days: { type: 'integer' },
    options: { type: 'object' },
    unit: { type: 'string' },
  },
  required: ['city'],
};
const ask = async () => {
  if (wanted.startsWith('streamed')) return client.messages.stream(asked).finalMessage();
  return client.messages.create(asked);
};
try {
  if (wanted.endsWith('tools')) {
    asked.tools = [{ name: 'get_weather', description: 'The weather.', input_schema: inputSchema }];
    const { content } = await ask();
    const results = content.filter((block) => block.type === 'tool_use').map((block) => {
      called.push(block.input);
      return { type: 'tool_result', tool_use_id: block.id, content: '晴' };
    });
    messages.push({ role: 'assistant', content }, { role: 'user', content: results });
  }
  const { content } = await ask();
  answer.said = content.at(-1).text;
} catch (error) {
  answer.error = `${error.name}: ${error.message}`;
}
console.log(`\n${JSON.stringify(answer)}`);
