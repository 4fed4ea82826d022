package keychain

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// hold is how long credentials outlive their pull: a container whose snapshot went missing has its layers brought again.
	hold = 10 * time.Minute
	// maxHeld bounds what is remembered; the oldest go first.
	maxHeld = 512
)

// book is the credentials of pulls, in the order in which they came.
type book struct {
	mu      sync.Mutex // guards entries
	entries []*entry
}

// entry is the credentials of one PullImage.
type entry struct {
	repository string
	host       string // that they are for; empty: any
	user       string // empty: secret is an identity token
	secret     string
	forgotten  time.Time // when to forget them; zero while the pull is under way
}

// add remembers the credentials of a pull that begins. done says how it ended; then they are kept for a while, or forgotten if
// they were of no use.
func (b *book) add(e *entry) (done func(useful bool)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweep(time.Now())
	if len(b.entries) == maxHeld {
		b.entries = b.entries[1:]
	}
	b.entries = append(b.entries, e)
	return func(useful bool) {
		b.mu.Lock()
		defer b.mu.Unlock()
		e.forgotten = time.Now()
		if useful {
			e.forgotten = e.forgotten.Add(hold)
		}
		b.sweep(time.Now())
	}
}

// sweep forgets what is due, and what a later pull has replaced. b.mu is held.
func (b *book) sweep(now time.Time) {
	newest := map[[2]string]*entry{}
	for _, e := range b.entries {
		newest[[2]string{e.repository, e.host}] = e
	}
	kept := b.entries[:0]
	for _, e := range b.entries {
		over := !e.forgotten.IsZero()
		if !over || now.Before(e.forgotten) && newest[[2]string{e.repository, e.host}] == e {
			kept = append(kept, e)
		}
	}
	clear(b.entries[len(kept):])
	b.entries = kept
}

// find returns the newest credentials for a repository at a host.
func (b *book) find(repository, host string) (user, secret string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweep(time.Now())
	for i := len(b.entries) - 1; i >= 0; i-- {
		if e := b.entries[i]; e.repository == repository && (e.host == "" || e.host == host) {
			return e.user, e.secret
		}
	}
	return "", ""
}

// Credentials are those that the last pull from a repository came with: ref is a reference, or the repository alone, and host
// the registry or mirror that asks. An empty user means that the secret is an identity token; both empty, that there are none.
func (s *Service) Credentials(_ context.Context, ref, host string) (user, secret string, err error) {
	repository, err := repositoryOf(ref)
	if err != nil {
		return "", "", err
	}
	user, secret = s.book.find(repository, host)
	return user, secret, nil
}

func repositoryOf(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("image reference %q: %w", ref, err)
	}
	return named.Name(), nil
}

// newEntry reads the credentials of a pull as containerd's CRI reads them; nil if it carries none. No error quotes a secret.
func newEntry(ref string, auth *cri.AuthConfig) (*entry, error) {
	if auth == nil {
		return nil, nil
	}
	repository, err := repositoryOf(ref)
	if err != nil {
		return nil, err
	}
	e := &entry{repository: repository}
	if auth.GetServerAddress() != "" {
		u, err := url.Parse(auth.GetServerAddress())
		if err != nil {
			return nil, errors.New("server address of the credentials is no URL")
		}
		if e.host = u.Host; e.host == "" {
			return nil, nil // what names no host fits none, as containerd compares them
		}
	}
	switch {
	case auth.GetUsername() != "":
		e.user, e.secret = auth.GetUsername(), auth.GetPassword()
	case auth.GetIdentityToken() != "":
		e.secret = auth.GetIdentityToken()
	case auth.GetAuth() != "":
		raw, err := base64.StdEncoding.DecodeString(auth.GetAuth())
		if err != nil {
			return nil, errors.New("auth of the credentials is not base64")
		}
		user, secret, ok := strings.Cut(string(raw), ":")
		if !ok {
			return nil, errors.New("auth of the credentials is not base64 of user:password")
		}
		e.user, e.secret = user, strings.Trim(secret, "\x00")
	default:
		return nil, nil
	}
	return e, nil
}
