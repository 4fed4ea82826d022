package images_test

import (
	"strings"
	"testing"

	"github.com/hearth-serverless/hearth/bench/images"
)

func TestHandlerOfNoRuntime(t *testing.T) {
	for _, name := range []string{"perl", "../go", ""} {
		if err := images.Handler(t.Context(), name, t.TempDir()); err == nil || !strings.Contains(err.Error(), "handler") {
			t.Errorf("%q: %v", name, err)
		}
	}
}
