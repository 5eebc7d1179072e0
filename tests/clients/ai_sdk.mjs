// The AI SDK, asked in one way: node ai_sdk.mjs CASE URL KEY. Prints as python_clients.py does.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';

const [wanted, url, apiKey] = process.argv.slice(2);
const called = [];
const answer = { said: '', called, error: '' };
const model = createOpenAICompatible({ name: 'qwen', baseURL: `${url}/v1`, apiKey })('Scripted');
const weather = tool({
  description: 'The weather.',
  inputSchema: jsonSchema({
    type: 'object',
    properties: {
      city: { type: 'string' },
      days: { type: 'integer' },
      options: { type: 'object' },
      unit: { type: 'string' },
    },
    required: ['city'],
  }),
  execute: (given) => {
    called.push(given);
    return '晴';
  },
});
try {
  const asked = { model, prompt: '?', onError: ({ error }) => { throw error; } };
  if (wanted.endsWith('tools')) Object.assign(asked, { tools: { get_weather: weather }, stopWhen: stepCountIs(3) });
  if (wanted.startsWith('streamed')) {
    for await (const text of streamText(asked).textStream) answer.said += text;
  } else {
    answer.said = (await generateText(asked)).text;
  }
} catch (error) {
  answer.error = `${error.name}: ${error.message}`;
}
console.log(`\n${JSON.stringify(answer)}`);
