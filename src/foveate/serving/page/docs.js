// Shows openapi.json without scripts of another host.
"use strict";

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function kind(schema, all) {
  if (schema.$ref) return kind({ ...all[schema.$ref.split("/").pop()], $ref: undefined }, all);
  if (schema.anyOf || schema.oneOf) return (schema.anyOf || schema.oneOf).map((one) => kind(one, all)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.type === "array") return `[${schema.items ? kind(schema.items, all) : ""}]`;
  if (schema.type === "object" && schema.title) return schema.title;
  return schema.type || "any";
}

function fields(name, all) {
  const table = element(
    "table",
    "",
    element("tr", "", element("th", "field"), element("th", "type"), element("th", "")),
  );
  const schema = all[name];
  for (const [field, own] of Object.entries(schema.properties || {})) {
    const needed = (schema.required || []).includes(field) ? "required" : "";
    const value = own.default !== undefined && own.default !== null ? `default ${JSON.stringify(own.default)}` : "";
    table.append(
      element(
        "tr",
        "",
        element("td", "", element("code", field)),
        element("td", kind(own, all)),
        element("td", [needed, own.description, value].filter(Boolean).join("; ")),
      ),
    );
  }
  return table;
}

async function show() {
  const place = document.getElementById("routes");
  const schema = await (await fetch("/openapi.json")).json();
  const all = schema.components.schemas;
  place.replaceChildren();
  for (const [path, methods] of Object.entries(schema.paths)) {
    for (const [method, own] of Object.entries(methods)) {
      const section = element("section", "", element("h2", "", element("code", `${method.toUpperCase()} ${path}`)));
      section.append(element("p", own.description || own.summary || ""));
      const json = own.requestBody?.content?.["application/json"]?.schema?.$ref;
      if (json) section.append(fields(json.split("/").pop(), all));
      const answer = own.responses?.["200"]?.content?.["application/json"]?.schema?.$ref;
      if (answer) section.append(element("h3", "answer"), fields(answer.split("/").pop(), all));
      place.append(section);
    }
  }
}

show().catch((error) => {
  document.getElementById("routes").textContent = `openapi.json cannot be read: ${error.message}`;
});
