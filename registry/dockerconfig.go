package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	distref "github.com/distribution/reference"
)

const (
	maxDockerConfigBytes = 1 << 20
	helperTimeout        = 15 * time.Second
	// dockerHubKey is what docker writes for Docker Hub, whatever host serves it.
	dockerHubKey = "https://index.docker.io/v1/"
)

// keychain finds credentials the way docker does. It keeps nothing: files and
// helpers are asked anew, so that rotated credentials are seen.
type keychain struct {
	path   string // "" = anonymous
	pulled func(ctx context.Context, ref, host string) (user, secret string, err error)
}

// dockerConfig is the part of config.json that concerns credentials.
type dockerConfig struct {
	Auths       map[string]dockerAuth `json:"auths"`
	CredsStore  string                `json:"credsStore"`
	CredHelpers map[string]string     `json:"credHelpers"`
}

type dockerAuth struct {
	Auth          string `json:"auth"` // base64 of user:password
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
}

// credential as containerd's authorizer wants it: an empty user means that the
// secret is an identity (refresh) token; both empty means anonymous.
type credential struct{ user, secret string }

func newKeychain(path string) (*keychain, error) {
	if path != "" {
		cfg, err := readDockerConfig(path)
		if err == nil {
			err = cfg.validate()
		}
		return &keychain{path: path}, err
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		return &keychain{path: filepath.Join(dir, "config.json")}, nil
	}
	if home, err := os.UserHomeDir(); err == nil {
		return &keychain{path: filepath.Join(home, ".docker", "config.json")}, nil
	}
	return &keychain{}, nil
}

// Credentials finds what an image's registry wants to know of the caller, for others who pull from it too. An empty user means
// that the secret is an identity token; both empty means that there is nothing to tell.
func (c *Client) Credentials(ctx context.Context, ref string) (user, secret string, err error) {
	named, err := distref.ParseDockerRef(ref)
	if err != nil {
		return "", "", fmt.Errorf("image reference %q: %w", ref, err)
	}
	cred, err := c.creds.lookup(ctx, named.Name(), distref.Domain(named))
	return cred.user, cred.secret, err
}

// lookup returns the credential for a repository at a registry host (host[:port]).
func (k *keychain) lookup(ctx context.Context, ref, host string) (credential, error) {
	if k.pulled != nil {
		user, secret, err := k.pulled(ctx, ref, host)
		if err != nil || user != "" || secret != "" {
			return credential{user, secret}, err
		}
	}
	if k.path == "" {
		return credential{}, nil
	}
	cfg, err := readDockerConfig(k.path)
	if errors.Is(err, fs.ErrNotExist) {
		return credential{}, nil
	}
	if err != nil {
		return credential{}, fmt.Errorf("read docker config: %w", err)
	}
	keys := configKeys(host)
	if helper, server := cfg.helper(keys); helper != "" {
		cred, found, err := runHelper(ctx, helper, server)
		if err != nil || found {
			return cred, err
		}
	}
	for _, key := range keys {
		cred, err := cfg.Auths[key].credential()
		if err != nil {
			return cred, fmt.Errorf("docker config entry %q: %w", key, err)
		}
		if cred != (credential{}) {
			return cred, nil
		}
	}
	return credential{}, nil
}

// helper returns the credential helper for a host and the name to ask it for.
func (c dockerConfig) helper(keys []string) (helper, server string) {
	for _, key := range keys {
		if h := c.CredHelpers[key]; h != "" {
			return h, key
		}
	}
	return c.CredsStore, keys[0]
}

// configKeys lists the spellings of a host in config.json, likeliest first.
func configKeys(host string) []string {
	switch host {
	case "docker.io", "registry-1.docker.io", "index.docker.io":
		return []string{dockerHubKey, "index.docker.io", "docker.io", "registry-1.docker.io"}
	}
	keys := []string{host}
	for _, scheme := range []string{"https://", "http://"} {
		for _, suffix := range []string{"", "/", "/v1/", "/v2/"} {
			keys = append(keys, scheme+host+suffix)
		}
	}
	return keys
}

func readDockerConfig(path string) (dockerConfig, error) {
	f, err := os.Open(path)
	if err != nil {
		return dockerConfig{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxDockerConfigBytes+1))
	if err != nil {
		return dockerConfig{}, err
	}
	cfg, err := parseDockerConfig(data)
	if err != nil {
		return dockerConfig{}, fmt.Errorf("%s: %w", path, err)
	}
	return cfg, nil
}

func parseDockerConfig(data []byte) (dockerConfig, error) {
	if len(data) > maxDockerConfigBytes {
		return dockerConfig{}, errors.New("larger than 1 MiB")
	}
	var cfg dockerConfig
	err := json.Unmarshal(data, &cfg)
	return cfg, err
}

// validate decodes every entry, so that a broken one is an error when the
// daemon starts and not at the first pull. No error quotes a secret.
func (c dockerConfig) validate() error {
	for key, auth := range c.Auths {
		if _, err := auth.credential(); err != nil {
			return fmt.Errorf("entry %q: %w", key, err)
		}
	}
	return nil
}

func (a dockerAuth) credential() (credential, error) {
	if a.IdentityToken != "" {
		return credential{secret: a.IdentityToken}, nil
	}
	if a.Auth == "" {
		return credential{a.Username, a.Password}, nil
	}
	raw, err := base64.StdEncoding.DecodeString(a.Auth)
	if err != nil {
		return credential{}, errors.New("auth is not base64")
	}
	user, secret, ok := strings.Cut(string(raw), ":")
	if !ok || user == "" {
		return credential{}, errors.New("auth is not base64 of user:password")
	}
	return credential{user, strings.TrimRight(secret, "\x00")}, nil
}

// runHelper speaks docker's credential helper protocol: `get`, the server on
// standard input, JSON on standard output. Its output is never quoted.
func runHelper(ctx context.Context, helper, server string) (cred credential, found bool, err error) {
	if helper != filepath.Base(helper) {
		return credential{}, false, fmt.Errorf("credential helper %q: not a plain name", helper)
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker-credential-"+helper, "get")
	cmd.WaitDelay = time.Second
	cmd.Stdin = strings.NewReader(server)
	out, err := cmd.Output()
	if bytes.Contains(out, []byte("credentials not found")) {
		return credential{}, false, nil
	}
	if ctx.Err() != nil {
		err = ctx.Err() // rather than that it was killed
	}
	if err != nil {
		return credential{}, false, fmt.Errorf("credential helper docker-credential-%s: %w", helper, err)
	}
	var answer struct{ Username, Secret string }
	if err := json.Unmarshal(out, &answer); err != nil {
		return credential{}, false, fmt.Errorf("credential helper docker-credential-%s: answer is not JSON", helper)
	}
	if answer.Username == "<token>" {
		answer.Username = ""
	}
	return credential{answer.Username, answer.Secret}, answer.Secret != "", nil
}
