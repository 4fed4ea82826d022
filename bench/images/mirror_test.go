package images

import (
	"strings"
	"testing"
	"testing/fstest"
)

func TestDebianSources(t *testing.T) {
	const none = ""
	for _, test := range []struct {
		name, file, text string
		main, security   string
	}{
		{"nothing", "sources.list.d/empty.list", "", none, none},
		{"one line", "sources.list", "deb http://near.example/debian bookworm main contrib\n", "http://near.example/debian", none},
		{"options", "sources.list.d/a.list", "# a\ndeb [arch=amd64 signed-by=/k] https://near.example/d bookworm-security main # b", none, none},
		{"another suite", "sources.list", "deb http://near.example/ubuntu noble main\n", none, none},
		{"another component", "sources.list", "deb http://near.example/debian bookworm contrib\n", none, none},
		{"sources only", "sources.list", "deb-src http://near.example/debian bookworm main\n", none, none},
		{"local", "sources.list", "deb cdrom:[Debian]/ bookworm main\n", none, none},
		{"stanzas", "sources.list.d/debian.sources", "Types: deb\n# c\nURIs: http://near.example/d\nSuites: bookworm bookworm-updates\nComponents: main\n\n" +
			"Types: deb\nURIs: http://near.example/s\nSuites: bookworm-security\nComponents: main\nSigned-By:\n -----BEGIN\n Version: 1\n", "http://near.example/d", "http://near.example/s"},
		{"disabled", "sources.list.d/debian.sources", "Types: deb\nEnabled: no\nURIs: http://near.example/d\nSuites: bookworm\nComponents: main\n", none, none},
		{"not for apt", "sources.list.d/debian.sources.save", "Types: deb\nURIs: http://near.example/d\nSuites: bookworm\nComponents: main\n", none, none},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := debianSources(fstest.MapFS{test.file: {Data: []byte(test.text)}}, "bookworm")
			if err != nil {
				t.Fatal(err)
			}
			signed := "deb [signed-by=" + keyring + "] "
			want := ""
			if test.main != none {
				want += signed + test.main + " bookworm main\n"
			}
			if test.security != none {
				want += signed + test.security + " bookworm-security main\n"
			}
			if got != want {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

func FuzzDebianSources(f *testing.F) {
	f.Add("deb [a=b] http://x/y bookworm main")
	f.Add("Types: deb\nURIs: http://x/y\nSuites: bookworm\nComponents: main\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, file := range []string{"sources.list", "sources.list.d/x.sources"} {
			got, err := debianSources(fstest.MapFS{file: {Data: []byte(text)}}, "bookworm")
			if err != nil || strings.Count(got, "\n") > 2 || got != "" && !strings.HasPrefix(got, "deb [signed-by=") {
				t.Errorf("%s: %q, %v", file, got, err)
			}
		}
	})
}
