// The description needs the API key, where the server has keys: it is asked for once a visit.
const key = () => sessionStorage.getItem("key");

async function start() {
  let answer = await fetch("openapi.json", key() ? { headers: { "x-api-key": key() } } : {});
  if (answer.status === 401) {
    const given = prompt("API key");
    if (given) {
      sessionStorage.setItem("key", given);
      answer = await fetch("openapi.json", { headers: { "x-api-key": given } });
    }
  }
  SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#api",
    deepLinking: true,
    validatorUrl: null,
    requestInterceptor: (request) => {
      if (key()) request.headers["x-api-key"] = key();
      return request;
    },
  });
}

start();
