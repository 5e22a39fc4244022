/** Shows what the server can be asked, by Swagger UI. */

SwaggerUIBundle({ url: "openapi.json", dom_id: "#docs" });
