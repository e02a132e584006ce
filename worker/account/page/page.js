"use strict";

// Passkeys, and the invitation of a link. Everything else works without this file.

const decode = (text) => Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0));
const encode = (buffer) =>
  btoa(String.fromCharCode(...new Uint8Array(buffer))).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

async function addPasskey(button) {
  const csrf = button.dataset.csrf;
  const options = await post("/passkeys/begin-adding", { csrf });
  options.challenge = decode(options.challenge);
  options.user.id = decode(options.user.id);
  for (const each of options.excludeCredentials) each.id = decode(each.id);
  const made = await navigator.credentials.create({ publicKey: options });
  await post("/passkeys/add", {
    csrf,
    credential: {
      id: made.id, rawId: encode(made.rawId), type: made.type,
      response: {
        clientDataJSON: encode(made.response.clientDataJSON),
        attestationObject: encode(made.response.attestationObject),
      },
    },
  });
  location.reload();
}

async function signIn(button) {
  const options = await post("/passkeys/begin", { next: button.dataset.next, code: button.dataset.code });
  options.challenge = decode(options.challenge);
  const shown = await navigator.credentials.get({ publicKey: options });
  const answer = await post("/passkeys/sign-in", {
    credential: {
      id: shown.id, rawId: encode(shown.rawId), type: shown.type,
      response: {
        clientDataJSON: encode(shown.response.clientDataJSON),
        authenticatorData: encode(shown.response.authenticatorData),
        signature: encode(shown.response.signature),
        userHandle: shown.response.userHandle && encode(shown.response.userHandle),
      },
    },
  });
  location.assign(answer.next);
}

for (const [id, act] of [["passkey-add", addPasskey], ["passkey-sign-in", signIn]]) {
  const button = document.getElementById(id);
  if (!button || !window.PublicKeyCredential) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    const problem = document.getElementById("passkey-problem");
    problem.textContent = "";
    try {
      await act(button);
    } catch (error) {
      problem.textContent = `The passkey was not used: ${error.message}`;
    }
  });
}

// Every way in takes the invitation, whether it is typed or in the link. It is behind the #, so that
// it is never sent in an address or written to a log.
const fields = document.querySelectorAll(".invitation");
const setInvitation = (secret) => fields.forEach((field) => { field.value = secret; });
fields.forEach((field) => field.addEventListener("input", () => setInvitation(field.value)));
const invited = new URLSearchParams(location.hash.slice(1)).get("invitation");
if (invited) {
  setInvitation(invited);
  history.replaceState(null, "", location.pathname + location.search);
}
