// What the clients for node share: node CLIENT.mjs CASE URL KEY asks one, and prints as python_clients.py does.
export const [wanted, url, apiKey] = process.argv.slice(2);
export const withTools = wanted.endsWith('tools');
export const streamed = wanted.startsWith('streamed');

const called = [];
export const weather = {
  description: 'The weather.',
  schema: {
    type: 'object',
    properties: {
      city: { type: 'string' },
      days: { type: 'integer' },
      options: { type: 'object' },
      unit: { type: 'string' },
    },
    required: ['city'],
  },
  call: (given) => {
    called.push(given);
    return '晴';
  },
};

/** Print what `ask` returns, the answer's text, or why there is none. */
export async function run(ask) {
  const answer = { said: '', called, error: '' };
  try {
    answer.said = await ask();
  } catch (error) {
    answer.error = `${error.name}: ${error.message}`;
  }
  console.log(`\n${JSON.stringify(answer)}`);
}
