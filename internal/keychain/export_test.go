package keychain

import cri "k8s.io/cri-api/pkg/apis/runtime/v1"

// Book opens the book to tests of time.
type Book struct{ book }

// NewBook makes an empty one.
func NewBook() *Book { return &Book{} }

// Pull begins a pull; the returned function ends it.
func (b *Book) Pull(repository, user string) func(bool) {
	return b.add(&entry{repository: repository, user: user})
}

// Find returns the user for a repository.
func (b *Book) Find(repository string) string {
	user, _ := b.find(repository, "")
	return user
}

// Held is how many entries there are.
func (b *book) Held() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.entries)
}

// Held is how many credentials are remembered.
func (s *Service) Held() int { return s.book.Held() }

// Check reads credentials.
func Check(ref string, auth *cri.AuthConfig) error {
	_, err := newEntry(ref, auth)
	return err
}
