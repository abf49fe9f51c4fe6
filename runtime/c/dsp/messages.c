/* SPDX-License-Identifier: Apache-2.0
 *
 * messages.c: error messages without printf: %s, %.<n>s, %d, %u and %llu are all that the support
 * library uses on the DSP. Another conversion is written as it stands.
 */
#include "internal.h"

#include <stdarg.h>

typedef struct {
  char *text;
  size_t capacity, length;
} writer;

static void put(writer *to, char c) {
  if (to->length + 1 < to->capacity) to->text[to->length++] = c;
  to->text[to->length] = '\0';
}

static void put_text(writer *to, const char *text, size_t limit) {
  for (size_t i = 0; i < limit && text[i] != '\0'; i++) put(to, text[i]);
}

static void put_number(writer *to, uint64_t value) {
  char digits[20];
  int count = 0;
  do digits[count++] = (char)('0' + value % 10);
  while ((value /= 10) != 0);
  while (count > 0) put(to, digits[--count]);
}

/* Writes one conversion, of which `format` is at the character behind '%'; returns the next one. */
static const char *put_conversion(writer *to, const char *format, va_list *arguments) {
  size_t limit = SIZE_MAX;
  if (*format == '.')
    for (limit = 0, format++; *format >= '0' && *format <= '9'; format++)
      limit = limit * 10 + (size_t)(*format - '0');
  if (*format == 's') {
    put_text(to, va_arg(*arguments, const char *), limit);
  } else if (*format == 'd') {
    int32_t value = va_arg(*arguments, int);
    if (value < 0) put(to, '-');
    put_number(to, value < 0 ? -(uint64_t)value : (uint64_t)value);
  } else if (*format == 'u') {
    put_number(to, va_arg(*arguments, unsigned));
  } else if (format[0] == 'l' && format[1] == 'l' && format[2] == 'u') {
    put_number(to, va_arg(*arguments, unsigned long long));
    format += 2;
  } else {
    put(to, '%');
    return format;
  }
  return format + 1;
}

llamac_status llamac_fail(llamac_error *error, llamac_status status, const char *format, ...) {
  if (error == NULL) return status;
  writer to = {error->message, sizeof error->message, 0};
  va_list arguments;
  va_start(arguments, format);
  error->message[0] = '\0';
  while (*format != '\0')
    if (*format == '%')
      format = put_conversion(&to, format + 1, &arguments);
    else
      put(&to, *format++);
  va_end(arguments);
  error->status = status;
  return status;
}

/* One thread runs kernels, so one place is enough. */
static char report[160];

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts) {
  writer to = {report, sizeof report, 0};
  put_text(&to, kind, SIZE_MAX);
  put_text(&to, ": ", SIZE_MAX);
  for (int32_t p = 0; p < num_parts; p++)
    if (parts[p] != NULL) put_text(&to, parts[p], SIZE_MAX);
}

void llamac_take_kernel_error(char *text, size_t capacity) {
  writer to = {text, capacity, 0};
  text[0] = '\0';
  put_text(&to, report, SIZE_MAX);
  report[0] = '\0';
}
