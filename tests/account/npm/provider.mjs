// A real OpenID Connect provider (oidc-provider) on loopback, with its own sign-in pages for tests.
// usage: node provider.mjs CLIENT_REDIRECT_URI; prints its issuer when it answers.
// Its identity tokens have no e-mail address, as the standard says: that is at /me.
// Who signs in types the e-mail address; one that begins with "unverified" is not verified.
import http from "node:http";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.NODE_PATH}/`);
const { default: Provider } = await import(require.resolve("oidc-provider"));

const server = http.createServer();
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const issuer = `http://localhost:${server.address().port}`;
const provider = new Provider(issuer, {
  clients: [{
    client_id: "hivewright", client_secret: "provider's-secret", redirect_uris: [process.argv[2]],
    grant_types: ["authorization_code"], response_types: ["code"],
  }],
  claims: { openid: ["sub"], email: ["email", "email_verified"] },
  pkce: { required: () => true },
  async findAccount(_, sub) {
    const email_verified = !sub.startsWith("unverified");
    return { accountId: sub, claims: async () => ({ sub, email: sub, email_verified }) };
  },
});
server.on("request", provider.callback());
console.log(issuer);
