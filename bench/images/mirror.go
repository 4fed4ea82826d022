package images

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// keyring is where Debian and Ubuntu keep Debian's keys, and where the image has them too.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// debianSources returns the lines of sources.list for a suite of Debian and its security updates, with the mirrors that the
// machine itself is set up with in etc, its /etc/apt. Where it is set up with none for the suite there are no lines: mmdebstrap
// knows Debian's own.
func debianSources(etc fs.FS, suite string) (string, error) {
	mirrors := map[string]string{suite: "", suite + "-security": ""}
	files := []string{"sources.list"}
	for _, pattern := range []string{"sources.list.d/*.list", "sources.list.d/*.sources"} {
		more, err := fs.Glob(etc, pattern)
		if err != nil {
			return "", err
		}
		files = append(files, more...)
	}
	for _, file := range files {
		text, err := fs.ReadFile(etc, file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("read apt sources: %w", err)
		}
		parse := parseList
		if strings.HasSuffix(file, ".sources") {
			parse = parseDeb822
		}
		for _, entry := range parse(string(text)) {
			if _, wanted := mirrors[entry.suite]; wanted {
				mirrors[entry.suite] = entry.uri
			}
		}
	}
	var lines strings.Builder
	for _, s := range []string{suite, suite + "-security"} {
		if mirrors[suite] == "" || mirrors[s] == "" {
			continue
		}
		fmt.Fprintf(&lines, "deb [signed-by=%s] %s %s main\n", keyring, mirrors[s], s)
	}
	return lines.String(), nil
}

// source is one place that has the component main of a suite.
type source struct{ uri, suite string }

// parseList reads the one-line format: deb [options] URI SUITE COMPONENT...
func parseList(text string) []source {
	var found []source
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		if before, after, ok := strings.Cut(line, "["); ok {
			_, after, _ = strings.Cut(after, "]")
			line = before + after
		}
		words := strings.Fields(line)
		if len(words) >= 4 && words[0] == "deb" && usable(words[1]) && slices.Contains(words[3:], "main") {
			found = append(found, source{uri: words[1], suite: words[2]})
		}
	}
	return found
}

// parseDeb822 reads the format of stanzas of fields; fields that continue on further lines keep their first one.
func parseDeb822(text string) []source {
	var found []source
	fields := map[string][]string{}
	end := func() {
		if slices.Contains(fields["types"], "deb") && slices.Contains(fields["components"], "main") &&
			!slices.Contains(fields["enabled"], "no") && len(fields["uris"]) > 0 && usable(fields["uris"][0]) {
			for _, suite := range fields["suites"] {
				found = append(found, source{uri: fields["uris"][0], suite: suite})
			}
		}
		clear(fields)
	}
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		if strings.TrimSpace(line) == "" {
			end()
			continue
		}
		if strings.HasPrefix(line, "#") {
			continue
		}
		if name, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			fields[strings.ToLower(name)] = strings.Fields(value)
		}
	}
	end()
	return found
}

// usable refuses mirrors that only this machine can reach in ways an image cannot, such as mirror+file or cdrom.
func usable(uri string) bool {
	return strings.HasPrefix(uri, "http://") || strings.HasPrefix(uri, "https://")
}
